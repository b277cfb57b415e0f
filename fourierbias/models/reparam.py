"""Convolutions that become self-attention with the same function (PRS, T-CNN, ConViT's gate).

A K×K convolution with zero padding is attention with one head per kernel tap h = (a, c), whose map A_h sends
every query to the token Δ_h = (a - p, c - p) away, p = (K - 1) / 2:

    Y = Σ_h A_h X W_h + b,    W_h = weight[:, :, a, c]ᵀ.

The values are X itself, in full width, and the output projection W_O = (W_h)_h is a permutation of the
kernel: nothing is approximated, and the number of channels may differ between input and output. That
attention can express a convolution is Cordonnier et al. (arXiv 1911.03584, theorem 1); the exact map between
the weights and all that is said of borders and strides was derived for this package and checked numerically.
From there each head may let content in, through a gate of its own.

What is whose. Switching a convolution for attention with the same function in the course of training is PRS
(Lee et al., arXiv 2210.01370); starting attention from a trained convolution is T-CNN (d'Ascoli et al.,
arXiv 2106.05795). Only their abstracts could be read for this package: no equation, gate or number here is
theirs. The ``sigmoid`` gate is ConViT's (d'Ascoli et al., arXiv 2103.10697); the ``linear`` gate, exact where
it starts and trainable from there, is ours, and so is the width of queries and keys.
"""

import copy
import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import FourierBiasError

GATES = ("linear", "sigmoid")
MEMORY_LIMIT = 4 * 2**30  # bytes that the attention of one layer may take, unless said otherwise
CHUNK_BYTES = 6 * 2**20  # attention maps computed at once on a CPU: about what its caches hold


# ------------------------------------------------------------------------------------- positional attention


def _axis_attention(kernel: int, size: int, stride: int, locality: float, dtype: torch.dtype) -> Tensor:
    """Return attention (K, queries, size + 2p) of the taps along one axis of the ringed grid."""
    p = kernel // 2
    queries = stride * torch.arange((size - 1) // stride + 1)
    wanted = queries + torch.arange(kernel)[:, None] - p
    offset = torch.arange(-p, size + p) - wanted[..., None]
    if math.isinf(locality):
        return (offset == 0).to(dtype)
    return torch.softmax(-locality * offset.to(dtype) ** 2, dim=-1)


def positional_attention(
    kernel: int,
    grid: tuple[int, int],
    stride: int = 1,
    locality: float = math.inf,
    *,
    ring: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return positional attention (Nq, K², N) of one head per tap: softmax over tokens of -α |δ - Δ_h|².

    ``grid`` = (H, W) has N = H·W tokens; the Nq queries are every ``stride``-th of them in both directions.
    α is ``locality``; at infinity every row is one-hot. p = (K - 1) / 2 rings of tokens of value zero take
    part in the softmax, which makes the limit zero padding exactly; ``ring`` keeps their columns, so that N
    is (H + 2p)(W + 2p) and every row sums to 1. The quadratic score is that of Cordonnier et al. and of
    ConViT; it falls apart into rows and columns, which is how it is computed here.

    >>> maps = positional_attention(3, (4, 4))
    >>> maps.shape, maps[5, 0].argmax().item()  # head 0 of token (1, 1) looks at token (0, 0)
    (torch.Size([16, 9, 16]), 0)
    """
    exact = torch.promote_types(dtype, torch.float32)  # α |δ|² is beyond half precision
    rows, columns = (_axis_attention(kernel, size, stride, locality, exact).to(device) for size in grid)
    if not ring:
        p = kernel // 2
        rows, columns = (maps[..., p : maps.shape[-1] - p] for maps in (rows, columns))
    maps = torch.einsum("air,cjs->ijacrs", rows, columns)
    return maps.flatten(4).flatten(2, 3).flatten(0, 1).to(dtype)


def _distances(grid: tuple[int, int], stride: int, p: int, device: torch.device) -> Tensor:
    """Return distances (Nq, tokens of the grid with p rings) between queries and keys, in patches."""
    squares = []
    for size in grid:
        queries = torch.arange(0, size, stride, device=device)
        squares.append((torch.arange(-p, size + p, device=device) - queries[:, None]).double() ** 2)
    rows, columns = squares
    both = rows[:, None, :, None] + columns[None, :, None, :]
    return both.sqrt().flatten(2).flatten(0, 1)


# ------------------------------------------------------------------------------------------ gated attention


class _ChunkedAttention(torch.autograd.Function):
    """Gated attention a few samples at a time, with the maps computed anew for the backward pass.

    On a CPU the maps' way to memory and back costs as much as the products. Here the maps of a few samples
    stay in the cache; all heads of a sample share their values, so that each step is one large product; and
    of the maps nothing is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, x: Tensor, taps: Tensor, position: Tensor, share: Tensor
    ) -> Tensor:
        B, heads, Nq, _ = q.shape
        N, C = x.shape[1:]
        low = position.to(q.dtype), share.to(q.dtype)
        n = _chunk_length(B, heads * Nq * N * q.element_size())
        scores, content = q.new_empty(2, n, heads, Nq, N)
        gathered = x.new_empty(B, Nq * heads, C)
        for s in _chunks(B, n):
            mixed = _mixed_maps(q[s], k[s], *low, scores, content)
            torch.bmm(mixed, x[s], out=gathered[s])
        ctx.save_for_backward(q, k, x, taps, position, share, gathered)
        return (gathered.view(B * Nq, -1) @ taps).view(B, Nq, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        q, k, x, taps, position, share, gathered = ctx.saved_tensors
        B, heads, Nq, _ = q.shape
        N, C = x.shape[1:]
        low = position.to(q.dtype), share.to(q.dtype)
        n = _chunk_length(B, heads * Nq * N * q.element_size())
        scores, content, product = q.new_empty(3, n, heads, Nq, N)
        d_gathered = x.new_empty(n * Nq, heads * C)
        dy = dy.to(q.dtype).contiguous()
        d_taps = (dy.view(B * Nq, -1).T @ gathered.view(B * Nq, -1)).T  # this way round is a third faster
        dq, dk, dx = torch.empty_like(q), torch.empty_like(k), torch.empty_like(x)
        # Sums over samples are kept in the precision of the gates, whatever the maps are computed in.
        d_position, d_share = torch.zeros_like(position), torch.zeros_like(share)
        for s in _chunks(B, n):
            m = s.stop - s.start
            mixed = _mixed_maps(q[s], k[s], *low, scores, content)
            d_values = torch.mm(dy[s].view(m * Nq, -1), taps.T, out=d_gathered[: m * Nq]).view(m, -1, C)
            torch.bmm(mixed.transpose(1, 2), d_values, out=dx[s])
            d_mixed = torch.bmm(d_values, x[s].transpose(1, 2), out=mixed).view(m, Nq, heads, N)
            for of_sample in d_mixed:
                d_position += of_sample
            # Backward of the softmax: A (dA - Σ A dA); the row sums are the gates' gradient, too.
            d_scores = torch.mul(d_mixed.transpose(1, 2), content[:m], out=product[:m])
            row = d_scores.sum(-1, keepdim=True)
            d_share += row.sum((0, 2, 3), dtype=d_share.dtype)
            d_scores.addcmul_(content[:m], row, value=-1)
            d_scores = d_scores.flatten(0, 1)
            torch.bmm(d_scores, k[s].flatten(0, 1), out=dq[s].flatten(0, 1))
            torch.bmm(d_scores.transpose(1, 2), q[s].flatten(0, 1), out=dk[s].flatten(0, 1))
        weight = low[1][:, None, None]
        dq, dk = dq.mul_(weight), dk.mul_(weight)
        return dq, dk, dx, d_taps, d_position, d_share


def _chunk_length(batch: int, bytes_per_sample: int) -> int:
    return max(1, min(batch, CHUNK_BYTES // max(1, bytes_per_sample)))


def _chunks(batch: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, batch)) for start in range(0, batch, length))


def _mixed_maps(
    q: Tensor, k: Tensor, position: Tensor, share: Tensor, scores: Tensor, content: Tensor
) -> Tensor:
    """Return position + share · softmax(q kᵀ) as (m, Nq·heads, N) in the memory of ``scores``.

    ``content`` is left holding the softmax, (m, heads, Nq, N). The order of queries and heads changes on the
    way, at no cost of its own, so that the heads' values lie side by side as the projection wants them.
    """
    m, heads, Nq, _ = q.shape
    N = k.shape[2]
    scores, content = scores[:m], content[:m]
    torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out=scores.flatten(0, 1))
    torch.softmax(scores, -1, out=content)
    mixed = scores.view(m, Nq, heads, N)
    torch.addcmul(position, content.transpose(1, 2), share[:, None], out=mixed)
    return mixed.view(m, Nq * heads, N)


def chunked_attention(
    q: Tensor, k: Tensor, x: Tensor, taps: Tensor, position: Tensor, share: Tensor
) -> Tensor:
    """Return gated attention Σ_h (P_h + c_h softmax(q_h k_hᵀ)) X W_h, shape (B, Nq, Co).

    q is (B, heads, Nq, d) with the scale in it, k (B, heads, N, d), x (B, N, Ci), ``taps`` (heads·Ci, Co),
    ``position`` P (Nq, heads, N) with its share in it, ``share`` c (heads,). A few samples at a time: see
    `fused_attention` for the other way to compute the same. Differentiable once.

    >>> q = k = torch.zeros(1, 9, 4, 2); x = torch.ones(1, 4, 3)
    >>> chunked_attention(q, k, x, torch.eye(27), torch.zeros(4, 9, 4), torch.ones(9)).shape
    torch.Size([1, 4, 27])
    """
    return _ChunkedAttention.apply(q, k, x, taps, position, share)


def fused_attention(
    q: Tensor, k: Tensor, x: Tensor, taps: Tensor, position: Tensor | None, share: Tensor
) -> Tensor:
    """Return what `chunked_attention` does, with content from `scaled_dot_product_attention`.

    ``position`` may be None: the content part alone.

    >>> q = k = torch.zeros(1, 9, 4, 2); x = torch.ones(1, 4, 3)
    >>> fused_attention(q, k, x, torch.eye(27), None, torch.ones(9)).shape
    torch.Size([1, 4, 27])
    """
    values = x[:, None].expand(-1, q.shape[1], -1, -1)
    content = F.scaled_dot_product_attention(q, k, values, scale=1.0)
    gathered = content.transpose(1, 2) * share.to(x.dtype)[:, None]
    if position is not None:
        gathered = gathered + (position.to(x.dtype).flatten(0, 1) @ x).view_as(gathered)
    return gathered.flatten(2) @ taps


# ------------------------------------------------------------------------------------------------ the layer


class ReparamConv2d(nn.Conv2d):
    """A convolution (B, Ci, H, W) -> (B, Co, Hq, Wq) that `reparameterize` turns into attention of K² heads.

    It is made as `nn.Conv2d` is, or from one by `from_conv`, and is one, at its cost, until then. Odd K,
    stride 1 or 2 and zero padding of (K - 1) / 2 are what it takes; others, dilation and groups raise
    FourierBiasError. ``weight`` and ``bias`` are the same parameters in both forms, so an optimiser's moments
    stay with them; the attention form adds ``query``, ``key`` (K²·d, Ci) and ``gate`` (K²,), and a buffer
    ``form`` that tells a state dict which gate and locality they belong to. Loading a state dict of the
    attention form into a convolution makes it attention first.

    On a CPU the attention form is `chunked_attention`, elsewhere a convolution with taps scaled by the gate
    and `fused_attention`; ``backend`` ("auto", "chunked", "fused") chooses otherwise. Differentiable once.

    >>> layer = ReparamConv2d(8, 16, 3, padding=1)
    >>> x = torch.randn(2, 8, 6, 6)
    >>> before = layer(x)
    >>> torch.allclose(layer.reparameterize()(x), before, atol=1e-5), layer.is_attention
    (True, True)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        reason = unsupported(self)
        if reason:
            raise FourierBiasError(f"{_numbers(self)} cannot become attention: {reason}")
        self.register_parameter("query", None)
        self.register_parameter("key", None)
        self.register_parameter("gate", None)
        self.register_buffer("form", None)
        self.backend: Literal["auto", "chunked", "fused"] = "auto"
        self.memory_limit: float = MEMORY_LIMIT

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "ReparamConv2d":
        """Return this layer in convolution form with the parameters of ``conv`` (the same objects).

        >>> conv = nn.Conv2d(4, 4, 3, padding=1)
        >>> ReparamConv2d.from_conv(conv).weight is conv.weight
        True
        """
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    # ------------------------------------------------------------------------------------------- the switch

    @property
    def is_attention(self) -> bool:
        """Whether the layer is in attention form."""
        return self.gate is not None

    @property
    def heads(self) -> int:
        """Number of heads, one for each tap of the kernel."""
        return self.kernel_size[0] ** 2

    @property
    def gate_kind(self) -> str | None:
        """Which gate the attention form has, "linear" or "sigmoid"; None for a convolution."""
        return GATES[int(self._form[0])] if self.is_attention else None

    @property
    def locality(self) -> float | None:
        """Locality strength α of positional attention, infinite where it is exact; None for a convolution."""
        return (self._form[1] or math.inf) if self.is_attention else None

    def reparameterize(
        self,
        gate: Literal["linear", "sigmoid"] = "linear",
        locality: float = math.inf,
        head_dim: int | None = None,
        gate_init: float | None = None,
        generator: torch.Generator | None = None,
        memory_limit: float = MEMORY_LIMIT,
    ) -> "ReparamConv2d":
        """Go over to attention that computes the same function, in place; return the layer.

        ``linear`` gate (ours; the default): A = A_pos + g (A_content - A_pos) for every head, g at first
        ``gate_init`` = 0: exact and trainable, for dL/dg is of order 1 there, and query and key get gradient
        from the second step on; training calls `bound_gate`, which keeps heads averages. ``sigmoid``
        (ConViT's): A = (1 - s) A_content + s A_pos with s = σ(λ) and λ at first ``gate_init`` = 1; it starts
        off the convolution by about 1 - s of the output (0.27 at λ = 1, 0.018 at 4, 4.5e-5 at 10), and the
        closer it starts the less it can learn.

        ``locality`` α makes A_pos a softmax of -α |δ - Δ|²; infinite is exact, and finite it leaves the
        convolution by about 4.6 exp(-α) of the output (0.078 at α = 4, 2.1e-4 at 10). ``head_dim`` d is the
        width of query and key (default: Ci / K², up to the next multiple of 8), truncated normal of standard
        deviation 0.02 as in ConViT, drawn from ``generator``. ``memory_limit`` is in bytes; see
        `attention_memory`.

        Raises FourierBiasError for options out of range and if the layer is attention already.

        >>> ReparamConv2d(72, 8, 3, padding=1).reparameterize("sigmoid", locality=8.0).query.shape
        torch.Size([72, 72])
        """
        if self.is_attention:
            raise FourierBiasError(f"{_numbers(self)} is attention already; reparameterize it once")
        if gate not in GATES:
            raise FourierBiasError(f"no gate called {gate!r}; use {' or '.join(GATES)}")
        if not locality > 0:
            raise FourierBiasError(f"locality is {locality}; give a number above 0 (inf is exact)")
        if head_dim is not None and head_dim < 1:
            raise FourierBiasError(f"head_dim is {head_dim}; give 1 or more")
        head_dim = head_dim or 8 * math.ceil(self.in_channels / self.heads / 8)
        self._add_attention(head_dim, [GATES.index(gate), 0.0 if math.isinf(locality) else locality])
        with torch.no_grad():
            for weight in (self.query, self.key):
                nn.init.trunc_normal_(weight, std=0.02, generator=generator)
            self.gate.fill_({"linear": 0.0, "sigmoid": 1.0}[gate] if gate_init is None else gate_init)
        self.memory_limit = memory_limit
        return self

    def _add_attention(self, head_dim: int, form: Sequence[float]) -> None:
        weight = self.weight
        shape = (self.heads * head_dim, self.in_channels)
        self.query, self.key = nn.Parameter(weight.new_empty(shape)), nn.Parameter(weight.new_empty(shape))
        self.gate = nn.Parameter(weight.new_empty(self.heads))
        # An average over checkpoints must leave the record as it is: hence 0, not infinity, for exact.
        self.form = torch.tensor(form, dtype=weight.dtype, device=weight.device)
        self._form = tuple(float(value) for value in form)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        keys = state_dict.get(f"{prefix}query"), state_dict.get(f"{prefix}form")
        if all(value is not None for value in keys):
            query, form = keys
            form = [round(float(form[0])), float(form[1])]
            if not self.is_attention:
                self._add_attention(len(query) // self.heads, form)
            self._form = tuple(form)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def new_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the switch added: query, key, gate; none for a convolution."""
        return [self.query, self.key, self.gate] if self.is_attention else []

    def shares(self) -> tuple[Tensor, Tensor]:
        """Return the shares (K²,) of positional and of content attention in every head; they sum to 1.

        >>> [share.sum().item() for share in ReparamConv2d(4, 4, 3, padding=1).reparameterize().shares()]
        [9.0, 0.0]
        """
        if not self.is_attention:
            ones = self.weight.new_ones(self.heads)
            return ones, 0 * ones
        if self.gate_kind == "linear":
            return 1 - self.gate, self.gate
        return self.gate.sigmoid(), (-self.gate).sigmoid()

    @torch.no_grad()
    def bound_gate(self) -> None:
        """Put the linear gate back into 0 … 1, so that heads are averages; for after a step of an optimiser.

        Left free, layers of `prs` went to a mean of -0.7: their heads subtract content, which no attention
        does. A gate that is stopped at 0 can still open, where one clamped in the forward pass would have no
        gradient any more.

        >>> layer = ReparamConv2d(4, 4, 3, padding=1).reparameterize(gate_init=-0.5)
        >>> layer.bound_gate()
        >>> layer.shares()[1].unique().tolist()
        [0.0]
        """
        if self.gate_kind == "linear":
            self.gate.clamp_(0, 1)

    # ------------------------------------------------------------------------------------------ the forward

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, Co, Hq, Wq) for (B, Ci, H, W), as a convolution or as attention."""
        if not self.is_attention:
            return super().forward(x)
        if x.dim() == 3:
            return self.forward(x[None])[0]
        position, content = self.shares()
        # In training the content part is computed behind a closed gate too: its gradient opens the gate.
        if not self.training and math.isinf(self.locality) and not content.any():
            return super().forward(x)
        dtype, without_autocast = _precision(x)
        with without_autocast:
            return self._attend(x.to(dtype), position, content)

    def _attend(self, x: Tensor, position: Tensor, content: Tensor) -> Tensor:
        chunked = self.backend == "chunked" or (self.backend == "auto" and x.device.type == "cpu")
        self._check_memory(x, chunked)
        tokens, q, k = self._tokens_queries_keys(x)
        weight = self.weight.to(x.dtype)
        taps = weight.permute(2, 3, 1, 0).reshape(-1, self.out_channels)  # W_O, (K²·Ci, Co)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if chunked:
            y = chunked_attention(q, k, tokens, taps, self._positional(x, position), content)
        elif math.isinf(self.locality):
            y = fused_attention(q, k, tokens, taps, None, content)
        else:
            y = fused_attention(q, k, tokens, taps, self._positional(x, position), content)
        y = y.transpose(1, 2).unflatten(2, self._query_grid(x))
        if _is_channels_first(x):
            y = y.contiguous()
        if not chunked and math.isinf(self.locality):
            scaled = weight * position.to(x.dtype).view(self.kernel_size)
            return y + F.conv2d(x, scaled, bias, self.stride, self._zeros)
        return y if bias is None else y + bias[:, None, None]

    def _tokens_queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (B, N, Ci), queries (B, K², Nq, d) with the scale in them, keys (B, K², N, d)."""
        tokens = x.flatten(2).transpose(1, 2).contiguous()
        head_dim, step = len(self.query) // self.heads, self.stride[0]
        both = torch.cat([self.query * head_dim**-0.5, self.key]).to(x.dtype)  # one product for both
        q, k = F.linear(tokens, both).unflatten(-1, (2, self.heads, head_dim)).permute(2, 0, 3, 1, 4)
        q = q.unflatten(2, x.shape[-2:])[:, :, ::step, ::step].flatten(2, 3)
        return tokens, q.contiguous(), k.contiguous()

    def _positional(self, x: Tensor, share: Tensor) -> Tensor:
        """Return positional attention (Nq, K², N), shared by all samples, scaled by its ``share`` (K²,)."""
        options = {"dtype": share.dtype, "device": x.device}
        maps = positional_attention(
            self.kernel_size[0], x.shape[-2:], self.stride[0], self.locality, **options
        )
        return maps * share[:, None]

    def _query_grid(self, x: Tensor) -> tuple[int, int]:
        return tuple((size - 1) // self.stride[0] + 1 for size in x.shape[-2:])

    @property
    def _zeros(self) -> int:
        return self.kernel_size[0] // 2

    def attention_memory(self, shape: Sequence[int], itemsize: int = 4, chunked: bool = True) -> int:
        """Estimate the bytes that attention takes for input of ``shape`` (B, Ci, H, W), kept ones included.

        ``chunked`` for the maps of a few samples at a time, otherwise those of the whole batch (which a fused
        kernel may or may not avoid).

        >>> ReparamConv2d(64, 64, 3, padding=1).attention_memory((32, 64, 14, 14)) // 2**20
        32
        """
        B, C, *grid = shape
        N = math.prod(grid)
        Nq = math.prod((size - 1) // self.stride[0] + 1 for size in grid)
        head_dim = len(self.query) // self.heads if self.is_attention else 0
        maps = self.heads * Nq * N * itemsize
        held = 3 * _chunk_length(B, maps) + 2 if chunked else B
        return held * maps + B * self.heads * (Nq * C + (Nq + N) * head_dim) * itemsize

    def _check_memory(self, x: Tensor, chunked: bool) -> None:
        needed = self.attention_memory(x.shape, x.element_size(), chunked)
        if needed > self.memory_limit:
            B, _, H, W = x.shape
            gib, limit = needed / 2**30, self.memory_limit / 2**30
            raise FourierBiasError(
                f"attention of {_numbers(self)} on a {H}×{W} grid, batch {B}, needs about {gib:.3g} GiB, "
                f"over the limit of {limit:.3g} GiB; reparameterize later layers, take smaller images or "
                "batches, or raise memory_limit"
            )

    # --------------------------------------------------------------------------------------- what it looks at

    @torch.no_grad()
    def attention_maps(self, x: Tensor) -> Tensor:
        """Return the gated maps (B, K², Nq, N) for input x, as analysis wants them; the forward has no need.

        The mass that positional attention lays on the padding is not in them: a row near the border may sum
        to less than 1. Raises FourierBiasError for a convolution and above ``memory_limit``.

        >>> layer = ReparamConv2d(4, 4, 3, padding=1).reparameterize()
        >>> layer.attention_maps(torch.randn(2, 4, 5, 5)).shape
        torch.Size([2, 9, 25, 25])
        """
        if not self.is_attention:
            raise FourierBiasError(f"{_numbers(self)} is a convolution still and has no attention maps")
        x = x.to(self.weight.dtype)
        self._check_memory(x, chunked=False)
        position, share = self.shares()
        maps = self._positional(x, position).transpose(0, 1)
        return maps + share[:, None, None] * self._content_maps(x)

    def _content_maps(self, x: Tensor) -> Tensor:
        _, q, k = self._tokens_queries_keys(x)
        return (q @ k.transpose(2, 3)).softmax(-1)

    @torch.no_grad()
    def attention_distance(self, x: Tensor) -> Tensor:
        """Return the mean distance (K²,) of every head's attention in patches of this layer's input x.

        ConViT's nonlocality (its eq. 8) averaged over queries and samples; tokens of the padding count with
        their distance, so that a convolution has the distance of its taps. The mean over all heads of a 3×3
        convolution is 1.073.

        >>> ReparamConv2d(4, 4, 3, padding=1).attention_distance(torch.zeros(1, 4, 5, 5))[:2].tolist()
        [1.414..., 1.0]
        """
        kernel, stride, p = self.kernel_size[0], self.stride[0], self._zeros
        position, share = self.shares()
        grid = tuple(x.shape[-2:])
        options = {"ring": True, "dtype": torch.float64, "device": x.device}
        maps = positional_attention(kernel, grid, stride, self.locality or math.inf, **options)
        distance = torch.einsum("qhk,qk->h", maps, _distances(grid, stride, p, x.device)) / len(maps)
        if self.is_attention:
            x = x.to(self.weight.dtype)
            within = _distances(grid, stride, 0, x.device)
            totals = (
                torch.einsum("bhqk,qk->h", self._content_maps(x[s]).double(), within)
                for s in _chunks(len(x), _chunk_length(len(x), self.heads * within.numel() * 4))
            )
            content = sum(totals) / (len(x) * len(within))
            distance = position * distance + share * content
        return distance.to(self.weight.dtype)

    @torch.no_grad()
    def statistics(self, x: Tensor | None = None) -> dict[str, float]:
        """Return gate and content share as means over heads, and with input x the mean attention distance.

        ``gate`` is g of the linear gate (0 for a convolution) or s = σ(λ), the share of position, of the
        sigmoid one; ``attention_distance`` is in patches.

        >>> ReparamConv2d(4, 4, 3, padding=1).statistics()
        {'gate': 0.0, 'content_share': 0.0}
        """
        position, content = (share.mean().item() for share in self.shares())
        values = {"gate": position if self.gate_kind == "sigmoid" else content, "content_share": content}
        if x is not None:
            values["attention_distance"] = self.attention_distance(x).mean().item()
        return values

    def extra_repr(self) -> str:
        """Add the form to what a convolution says of itself."""
        if not self.is_attention:
            return super().extra_repr()
        return f"{super().extra_repr()}, attention: {self.gate_kind} gate, locality={self.locality:g}"


def _precision(x: Tensor) -> tuple[torch.dtype, Any]:
    """Return the dtype that autocast, where it is on, wants for x, and a context without autocast."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x.dtype, nullcontext()
    dtype = x.dtype if x.dtype is torch.float64 else torch.get_autocast_dtype(kind)
    return dtype, torch.autocast(kind, enabled=False)


def _is_channels_first(x: Tensor) -> bool:
    return x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------- layers of a model


def _numbers(conv: nn.Conv2d) -> str:
    rows, columns = conv.kernel_size
    return f"the {rows}×{columns} convolution {conv.in_channels} -> {conv.out_channels}"


def unsupported(conv: nn.Conv2d) -> str | None:
    """Return why a convolution cannot become attention, or None if it can.

    >>> unsupported(nn.Conv2d(4, 4, 3, padding=1)), unsupported(nn.Conv2d(4, 4, 4))
    (None, 'its kernel is 4×4; square kernels of odd size have a middle tap')
    """
    rows, columns = conv.kernel_size
    if rows != columns or rows % 2 == 0:
        return f"its kernel is {rows}×{columns}; square kernels of odd size have a middle tap"
    if conv.stride not in ((1, 1), (2, 2)):
        return f"its stride is {conv.stride}; 1 and 2 are supported"
    if conv.dilation != (1, 1):
        return f"its dilation is {conv.dilation}; only 1 is supported"
    if conv.groups != 1:
        return f"it has {conv.groups} groups; only 1 is supported"
    same = conv.padding == "same" and conv.stride == (1, 1)
    if not same and conv.padding != (rows // 2, rows // 2) and not (rows == 1 and conv.padding == "valid"):
        return f"its padding is {conv.padding}; only ({rows // 2}, {rows // 2}) keeps the grid"
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode!r}; only zeros are supported"
    return None


def _why_not(module: nn.Module) -> str | None:
    """Return why a module of a network cannot be replaced by `ReparamConv2d`, or None if it can."""
    if type(module) not in (nn.Conv2d, ReparamConv2d):  # subclasses compute something else
        return f"it is a {type(module).__name__}"
    if module._forward_pre_hooks or module._forward_hooks or hasattr(module, "parametrizations"):
        return "it has hooks"
    return unsupported(module)


def reparam_layers(model: nn.Module) -> dict[str, ReparamConv2d]:
    """Return the `ReparamConv2d` of a network by name, in the order of its modules.

    >>> reparam_layers(nn.Sequential(nn.ReLU(), ReparamConv2d(4, 4, 3, padding=1))).keys()
    dict_keys(['1'])
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, ReparamConv2d)}


def _match(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Return the names of the convolutions meant by ``patterns``, in the order of the network's modules.

    A glob, or the name of a container, means the convolutions below of kernel 3×3 or more that can become
    attention; the name of a convolution means that one, and FourierBiasError says why if it cannot.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    possible = [
        name
        for name, m in modules.items()
        if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1 and _why_not(m) is None
    ]
    chosen = set()
    for pattern in patterns:
        if isinstance(modules.get(pattern), nn.Conv2d):
            reason = _why_not(modules[pattern])
            if reason:
                numbers = _numbers(modules[pattern])
                raise FourierBiasError(f"{pattern}, {numbers}, cannot become attention: {reason}")
            found = {pattern}
        else:
            globs = (pattern, f"{pattern}.*")
            found = {n for n in possible if any(fnmatch.fnmatchcase(n, glob) for glob in globs)}
        if not found:
            raise FourierBiasError(f"{pattern!r} names no convolution {_offer(possible)}")
        chosen |= found
    return [name for name in modules if name in chosen]


def _offer(names: Sequence[str]) -> str:
    if not names:
        return "that can become attention; this network has none"
    some = names if len(names) <= 4 else [*names[:2], *names[-2:]]
    return f"that can become attention; such are {', '.join(some)}" + (
        f" ({len(names)} in all)" if len(names) > len(some) else ""
    )


def make_reparameterizable(model: nn.Module, layers: str | Iterable[str]) -> list[str]:
    """Put `ReparamConv2d`, in convolution form, where ``layers`` names convolutions; return their names.

    In place, with the same parameters under the same names. ``layers`` are names or glob patterns as for
    `recast`; raises FourierBiasError as it does.

    >>> make_reparameterizable(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)), "*")
    ['0']
    """
    names = _match(model, [layers] if isinstance(layers, str) else layers)
    made: dict[int, ReparamConv2d] = {}  # a convolution used in two places stays one
    for name in names:
        conv = model.get_submodule(name)
        if not isinstance(conv, ReparamConv2d):
            parent, _, own = name.rpartition(".")
            layer = made.setdefault(id(conv), ReparamConv2d.from_conv(conv))
            setattr(model.get_submodule(parent), own, layer)
    return names


def recast(
    model: nn.Module,
    layers: str | Iterable[str],
    *,
    gate: Literal["linear", "sigmoid"] = "linear",
    locality: float = math.inf,
    head_dim: int | None = None,
    gate_init: float | None = None,
    generator: torch.Generator | None = None,
    memory_limit: float = MEMORY_LIMIT,
) -> nn.Module:
    """Return a copy of a network in which the convolutions named by ``layers`` are attention.

    It computes the same function (the idea of T-CNN, d'Ascoli et al., arXiv 2106.05795, whose own choices of
    layers, gate and widths are not known to us), exactly so with the linear gate and infinite locality; the
    options are those of `ReparamConv2d.reparameterize`. ``layers`` are names or glob patterns on the names of
    the network's modules: ``"layer4.*.conv2"``, or ``"layer4"`` for all below it. Patterns take what can
    become attention and has a kernel of 3×3 or more, and leave the rest.

    A checkpoint of the copy can be read again if one of the network could (`models.checkpoint.create`).
    Raises FourierBiasError for a pattern that names no such convolution, and for a named convolution that
    cannot become attention.

    >>> import timm
    >>> model = timm.create_model("resnet10t").eval()
    >>> attentive, x = recast(model, "layer4.*").eval(), torch.randn(1, 3, 64, 64)
    >>> list(reparam_layers(attentive)), torch.allclose(attentive(x), model(x), atol=1e-4)
    (['layer4.0.conv1', 'layer4.0.conv2'], True)
    """
    from .checkpoint import built_from

    model = copy.deepcopy(model)
    names = make_reparameterizable(model, layers)
    for name in names:
        layer = model.get_submodule(name)
        if not layer.is_attention:
            layer.reparameterize(gate, locality, head_dim, gate_init, generator, memory_limit)
    with suppress(FourierBiasError):  # how this network was built is not known
        record = built_from(model)
        earlier = (record["recast"] or {}).get("layers", [])
        model.built_from = {**record, "recast": {"layers": [*earlier, *names]}}
    return model


@torch.no_grad()
def attention_statistics(model: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    """Run a network once and return the `statistics` of every `ReparamConv2d` by name, distances included.

    ``images`` is a batch (B, 3, H, W). The network runs in evaluation mode and is left in the mode it was in;
    each layer's input is reduced as it comes by.

    >>> model = nn.Sequential(ReparamConv2d(3, 4, 3, padding=1))
    >>> attention_statistics(model, torch.randn(2, 3, 8, 8))["0"]["attention_distance"]
    1.07...
    """
    found: dict[str, dict[str, float]] = {}
    layers, modes = reparam_layers(model), {m: m.training for m in model.modules()}
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, args, name=name: found.update({name: m.statistics(args[0])})
        )
        for name, layer in layers.items()
    ]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return {name: found[name] for name in layers if name in found}
