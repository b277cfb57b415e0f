"""Captures in parts: stopped and gone on with, as shards, by several processes; and with no room to write."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from test_store import make_capture, write

from fourierbias import FourierBiasError
from fourierbias.capturing import capture, merge
from fourierbias.cli import main
from fourierbias.figures import plot
from fourierbias.models.checkpoint import Checkpoint, create, save_checkpoint
from fourierbias.store import load
from fourierbias.writing import Writer

EVERYTHING = {"paths": ("diagonal", "radial", "2d"), "measures": "all", "features": True}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A checkpoint of a very small `vit`."""
    path = tmp_path_factory.mktemp("network") / "small.ckpt"
    arch_args = {"embed_dim": 12, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = create("vit", num_classes=10, **arch_args)
    classes = [str(number) for number in range(10)]
    save_checkpoint(
        path, Checkpoint(arch="vit", arch_args=arch_args, state_dict=model.state_dict(), classes=classes)
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder of fifty, of which two cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(50):
        (folder / f"{index % 3}").mkdir(exist_ok=True)
        path = folder / f"{index % 3}" / f"{index:02d}.png"
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        if index in (7, 31):
            path.write_bytes(path.read_bytes()[:100])
    return folder


def assert_equal(found, expected, atol):
    """The same spectra, measures, counts, images, labels and maps."""
    assert list(found) == list(expected)
    assert (found.images, found.labels) == (expected.images, expected.labels)
    for key in ("count", "failed_images", "failures", "skipped", "skipped_measures", "input_size"):
        assert found.attrs[key] == expected.attrs[key], key
    for name, layer in expected.layers.items():
        other = found.layers[name]
        assert {k: v for k, v in other.attrs.items()} == layer.attrs
        for path, spectrum in layer.spectra.items():
            theirs = other.spectra[path]
            assert (theirs.count, theirs.rejected) == (spectrum.count, spectrum.rejected)
            np.testing.assert_allclose(theirs.log_amplitude, spectrum.log_amplitude, rtol=0, atol=atol)
            np.testing.assert_allclose(theirs.variance, spectrum.variance, rtol=1e-12, atol=10 * atol)
        assert set(other.measures) == set(layer.measures)
        for measure, values in layer.measures.items():
            theirs = other.measures[measure]
            np.testing.assert_allclose(theirs.mean, values.mean, rtol=0, atol=10 * atol)
            assert (theirs.count, theirs.attrs) == (values.count, values.attrs)
        if expected.attrs["identity"]["features"]:
            ours, maps = found.feature_maps(name), expected.feature_maps(name)
            assert ours.dtype == maps.dtype
            np.testing.assert_allclose(ours, maps, rtol=0, atol=0.02 if atol > 1e-9 else 0)


def launch(ranks, *words, **options):
    """``fourierbias`` under torchrun, as typed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, *launcher, "-m", "fourierbias", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        **options,
    )


def typed(*words):
    """The exit status of the command line."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return stopped.value.code


# -- the file ------------------------------------------------------------------------------------------------


def test_maps_stream_in_and_come_out(tmp_path):
    capture = make_capture()
    writer = Writer(tmp_path / "a.h5")
    maps = torch.randn(5, 3, 8, 8).numpy()
    writer.append_maps({"stem": maps[:2]})
    writer.append_maps({"stem": maps[2:]})
    result = writer.finish(capture)
    np.testing.assert_allclose(result.feature_maps("stem"), maps, atol=2e-3)
    assert result.feature_maps("stem").dtype == np.float16
    with pytest.raises(FourierBiasError, match="--features"):
        result.feature_maps("blocks.0:attn")
    with pytest.raises(FourierBiasError, match="no layer 'x'"):
        result.feature_maps("x")


@pytest.mark.parametrize("compression", ["gzip", "lzf", "none"])
def test_compressions_are_lossless_in_float32(tmp_path, compression):
    writer = Writer(tmp_path / "a.h5", feature_dtype="float32", compression=compression)
    maps = torch.randn(2, 3, 8, 8).numpy()
    writer.append_maps({"stem": maps})
    np.testing.assert_array_equal(writer.finish(make_capture()).feature_maps("stem"), maps)


def test_the_final_name_appears_only_when_the_file_is_whole(tmp_path):
    writer = Writer(tmp_path / "a.h5")
    writer.append_maps({"stem": np.zeros((1, 3, 8, 8))})
    assert not (tmp_path / "a.h5").exists()
    writer.abandon()
    assert not list(tmp_path.iterdir())
    write(tmp_path / "a.h5", make_capture())
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_outputs_are_checked_before_any_work(tmp_path):
    write(tmp_path / "a.h5", make_capture())
    with pytest.raises(FourierBiasError, match=r"exists.*--overwrite"):
        Writer(tmp_path / "a.h5")
    write(tmp_path / "a.h5", make_capture(), overwrite=True)
    with pytest.raises(FourierBiasError, match="does not exist: create it"):
        Writer(tmp_path / "no" / "a.h5")
    with pytest.raises(FourierBiasError, match="is a folder"):
        Writer(tmp_path)
    with pytest.raises(FourierBiasError, match="float16 or float32"):
        Writer(tmp_path / "b.h5", feature_dtype="int8")


def test_a_second_capture_into_the_same_file_is_refused(network, tmp_path, capsys):
    with Writer(tmp_path / "a.h5"):
        assert typed("capture", network, "--images", 2, "-o", tmp_path / "a.h5") == 2
    assert "another capture is writing" in capsys.readouterr().err
    assert typed("capture", network, "--images", 2, "-o", tmp_path / "a.h5") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


# -- shards and ranks ----------------------------------------------------------------------------------------


def test_shards_merged_equal_one_process(network, folder, tmp_path):
    options = {**EVERYTHING, "batch_size": 5, "limit": 40}  # shards of two batches
    whole = capture(network, folder, output=tmp_path / "whole.h5", **options)
    assert (whole.attrs["count"], whole.attrs["failed_images"]) == (39, 1)
    files = [tmp_path / f"part-{k}.h5" for k in (1, 2, 3, 4)]
    for k, file in enumerate(files, start=1):
        part = capture(network, folder, output=file, shard=(k, 4), **options)
        assert part.attrs["count"] + part.attrs["failed_images"] == 10
        assert load(file).attrs["part"] == f"images {10 * k - 10} to {10 * k - 1} of 40"
    for consolidate in (False, True):
        merged = merge(files[::-1], tmp_path / "merged.h5", consolidate=consolidate, overwrite=True)
        assert_equal(merged, whole, atol=1e-12)
        assert_equal(load(tmp_path / "merged.h5"), load(tmp_path / "whole.h5"), atol=1e-12)
        with h5py.File(tmp_path / "merged.h5") as file:
            assert file["layers/blocks.0/feature_maps"].is_virtual is not consolidate
    merge(files, tmp_path / "merged.h5", overwrite=True)
    files[2].unlink()
    with pytest.raises(FourierBiasError, match=r"part-3\.h5 is gone"):
        load(tmp_path / "merged.h5").feature_maps(next(iter(whole)))


def test_parts_that_do_not_make_a_whole_are_refused(network, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = ("capture", network, "--data", folder, "--images", 12)
    for k in (1, 2, 3):
        assert typed(*one, "--shard", f"{k}/3", "-o", f"{k}.h5") == 0
    assert typed(*one, "--shard", "2/4", "-o", "other.h5") == 0
    assert typed(*one, "--shard", "3/3", "--path", "radial", "-o", "radial.h5") == 0
    assert typed(*one, "-o", "all.h5") == 0
    capsys.readouterr()
    for files, message in {
        ("1.h5", "3.h5"): "images 4 to 7 are in none of the parts",
        ("2.h5", "3.h5"): "images 0 to 3 are in none of the parts",
        ("1.h5", "2.h5"): "images 8 to 11 are in none of the parts",
        ("1.h5", "2.h5", "2.h5", "3.h5"): "2.h5 and 2.h5 both hold image 4",
        ("1.h5", "other.h5", "2.h5", "3.h5"): "1.h5 and other.h5 both hold image 3",
        ("1.h5", "2.h5", "radial.h5"): "radial.h5 and 1.h5 are not of one capture: they differ in paths",
        ("all.h5",): "all.h5 is no part of a capture",
        ("no.h5",): "no file no.h5",
    }.items():
        assert typed("merge", *files, "-o", "merged.h5") == 2
        assert message in capsys.readouterr().err
    for shard in ("0/3", "4/3", "x", "1-3"):
        assert typed(*one, "--shard", shard, "-o", "x.h5") == 2
    assert not list(tmp_path.glob("merged*"))
    assert typed("merge", "1.h5", "2.h5", "3.h5", "-o", "merged.h5") == 0
    assert_equal(load("merged.h5"), load("all.h5"), atol=1e-6)


def test_parts_are_not_overwritten_by_their_whole(network, folder, tmp_path):
    words = {"layers": "stages", "features": True, "limit": 8}
    files = [tmp_path / f"{k}.h5" for k in (1, 2)]
    for k, file in enumerate(files, start=1):
        capture(network, folder, output=file, shard=(k, 2), **words)
    before = files[0].read_bytes()
    with pytest.raises(FourierBiasError, match=r"1\.h5 is one of the parts"):
        merge(files, tmp_path / "." / "1.h5", overwrite=True)
    assert files[0].read_bytes() == before


def test_a_finished_part_is_not_taken_for_another(network, folder, tmp_path):
    words = {"output": tmp_path / "a.h5", "resume": True, "limit": 8}
    first = capture(network, folder, shard=(1, 2), **words)
    assert capture(network, folder, shard=(1, 2), **words).images == first.images
    for shard in ((2, 2), None):
        with pytest.raises(FourierBiasError, match=r"differs in images \(images 0 to 3 of 8, not"):
            capture(network, folder, shard=shard, **words)


def test_other_images_of_the_same_names_are_not_gone_on_with(network, tmp_path):
    output, x = tmp_path / "a.h5", torch.rand(4, 3, 32, 32)
    first = capture(network, x, output=output)
    assert_equal(capture(network, x.clone(), output=output, resume=True), first, atol=0)
    with pytest.raises(FourierBiasError, match="differs in fingerprint"):
        capture(network, x + 1, output=output, resume=True)
    seeds = [
        capture(network, "photos", limit=17, seed=seed, output=tmp_path / f"{seed}.h5") for seed in (0, 1)
    ]
    with pytest.raises(FourierBiasError, match="differs in fingerprint"):
        capture(network, "photos", limit=17, seed=1, output=tmp_path / "0.h5", resume=True)
    assert "not the same images" in plot(seeds).get_supxlabel()
    for seed in (0, 1):
        part = {"limit": 18, "seed": seed, "shard": (seed + 1, 2)}
        capture(network, "photos", output=tmp_path / f"part-{seed}.h5", **part)
    with pytest.raises(FourierBiasError, match="differ in fingerprint"):
        merge([tmp_path / f"part-{seed}.h5" for seed in (0, 1)], tmp_path / "all.h5")


def test_parts_without_an_image_that_can_be_read(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for index in range(4):
        Image.new("RGB", (32, 32), (index, 50, 99)).save(tmp_path / "images" / f"{index}.png")
    for index in (0, 1):
        (tmp_path / "images" / f"{index}.png").write_bytes(b"no image")
    words = ["capture", network, "--data", "images", "--features", "-o"]
    for k in range(1, 7):  # more parts than images
        assert typed(*words, f"{k}.h5", "--shard", f"{k}/6") == 0
    assert typed(*words, "whole.h5", "--batch-size", 1) == 0
    assert typed("merge", *(f"{k}.h5" for k in range(1, 7)), "-o", "merged.h5") == 0
    assert_equal(load("merged.h5"), load("whole.h5"), atol=1e-12)
    assert typed("plot", "2.h5", "-o", "empty.png") == 2


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(network, folder, tmp_path, ranks):
    whole = capture(network, folder, output=tmp_path / "whole.h5", batch_size=5, **EVERYTHING)
    words = ["capture", network, "--data", folder, "--measure", "all", "--features", "--batch-size", 5]
    words += ["--path", "diagonal", "--path", "radial", "--path", "2d", "-o", tmp_path / "ranks.h5"]
    done = launch(ranks, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1
    assert done.stderr.count("images could not be read") == 1
    assert_equal(load(tmp_path / "ranks.h5"), load(tmp_path / "whole.h5"), atol=1e-6)
    assert len(list(tmp_path.glob("ranks.maps-*.h5"))) == ranks
    done = launch(ranks, *words, "--consolidate", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.h5", "whole.h5"]
    assert_equal(load(tmp_path / "ranks.h5"), whole, atol=1e-6)


def test_what_fails_on_ranks_is_said_once(network, tmp_path):
    done = launch(2, "capture", network, "--data", tmp_path / "none", "-o", tmp_path / "a.h5")
    assert done.returncode != 0
    assert done.stderr.count("Error: ") - done.stderr.count("ChildFailedError: ") == 1
    assert not list(tmp_path.iterdir())


# -- stopped, and gone on with -------------------------------------------------------------------------------


def test_interrupted_and_resumed(network, folder, tmp_path):
    options = {**EVERYTHING, "batch_size": 4}
    whole = capture(network, folder, output=tmp_path / "whole.h5", **options)
    output = tmp_path / "a.h5"

    def stop_at(count):
        return lambda done, total: os.kill(os.getpid(), signal.SIGINT) if done == count else None

    with pytest.raises(KeyboardInterrupt, match=r"after 12 of 50 images.*--resume"):
        capture(network, folder, output=output, progress=stop_at(12), **options)
    assert not output.exists()
    with pytest.raises(FourierBiasError, match=r"interrupted: --resume goes on, --overwrite"):
        capture(network, folder, output=output, **options)
    with pytest.raises(FourierBiasError, match=r"another capture, it differs in eps \(1e-06, not 0\.001\)"):
        capture(network, folder, output=output, resume=True, eps=1e-3, **options)
    with pytest.raises(KeyboardInterrupt, match="after 36 of 50 images"):
        capture(network, folder, output=output, resume=True, progress=stop_at(36), **options)
    seen = []
    resumed = capture(
        network, folder, output=output, resume=True, progress=lambda *at: seen.append(at), **options
    )
    assert seen[0] == (36, 50)
    assert_equal(resumed, whole, atol=0)
    assert_equal(load(output), load(tmp_path / "whole.h5"), atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "whole.h5"]
    before = output.stat()
    assert_equal(capture(network, folder, output=output, resume=True, **options), whole, atol=0)
    assert output.stat() == before
    with pytest.raises(FourierBiasError, match="another capture, it differs in batch_size"):
        capture(network, folder, output=output, resume=True, **{**options, "batch_size": 8})


def test_a_stopped_command_says_how_to_go_on(network, folder, tmp_path):
    words = [sys.executable, "-m", "fourierbias", "capture", str(network), "--data", str(folder)]
    words += ["--batch-size", "1", "--save-every", "0", "--features", "-o", str(tmp_path / "a.h5")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "a.h5.state").exists():
            time.sleep(0.01)
            assert process.poll() is None
        process.terminate()
        said = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert said[-1].startswith("Stopped after ")
    assert "--resume" in said[-1]
    assert typed(*words[3:], "--resume") == 0
    assert load(tmp_path / "a.h5").attrs["count"] == 48


def test_a_module_of_ones_own_resumes_with_its_own_weights(tmp_path):
    images, output = torch.randn(6, 3, 32, 32), tmp_path / "a.h5"
    model = create("vit", num_classes=10, embed_dim=12, depth=2, num_heads=2)

    def stop(done, total):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        capture(model, images, output=output, batch_size=2, progress=stop)
    with torch.no_grad():
        model.norm.bias += 1
    with pytest.raises(FourierBiasError, match="differs in weights"):
        capture(model, images, output=output, batch_size=2, resume=True)


def check_kills(network, folder, tmp_path, kills):
    """Kill captures at so many random moments; what is resumed equals what was never interrupted."""
    options = {**EVERYTHING, "batch_size": 2}
    started = time.perf_counter()
    capture(network, folder, output=tmp_path / "whole.h5", save_every=0, **options)
    seconds = time.perf_counter() - started
    whole, rng = load(tmp_path / "whole.h5"), random.Random(0)
    context = multiprocessing.get_context("fork")
    killed = finished = 0
    while True:
        output = tmp_path / f"{finished}.h5"
        process = context.Process(
            target=lambda output=output: capture(
                network, folder, output=output, resume=True, save_every=0, **options
            )
        )
        process.start()
        process.join(rng.uniform(0, seconds) if killed < kills else 60)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        else:
            assert process.exitcode == 0
            assert_equal(load(output), whole, atol=1e-12)
            finished += 1
        if output.exists():  # under its name a file is always whole
            assert load(output).attrs["count"] == 48
        if killed == kills and process.exitcode == 0:
            break
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".h5" and path.suffix != ".lock"]


def test_killed_at_a_few_moments(network, folder, tmp_path):
    check_kills(network, folder, tmp_path, 4)


@pytest.mark.slow
def test_killed_at_many_moments(network, folder, tmp_path):
    check_kills(network, folder, tmp_path, 38)  # of training there are twelve more


def run_alone(words, limit=None):
    """The command line in a process of its own, whose files cannot grow beyond ``limit`` bytes."""

    def restrict():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "fourierbias", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=restrict, timeout=120)


@pytest.mark.parametrize("share", [0.3, pytest.param(0.7, marks=pytest.mark.slow), 0.98])
def test_a_full_disk_is_said_in_one_line_and_resumed_from(network, folder, tmp_path, share):
    words = ["capture", network, "--data", folder, "--features", "--compression", "none", "--batch-size", 2]
    assert run_alone([*words, "-o", tmp_path / "whole.h5"]).returncode == 0
    limit = int(share * (tmp_path / "whole.h5").stat().st_size)
    words += ["--save-every", 0.05, "-o", tmp_path / "a.h5"]
    done = run_alone(words, limit)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"Error: no room to write {tmp_path / 'a.h5'}: it needs ")
    assert " are free in " in done.stderr
    assert done.stderr.count("Error") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a.h5").exists()
    assert not (tmp_path / "a.h5.partial").exists()
    done = run_alone([*words, "--resume"])
    assert done.returncode == 0, done.stderr
    assert_equal(load(tmp_path / "a.h5"), load(tmp_path / "whole.h5"), atol=1e-12)
