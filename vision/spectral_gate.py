"""The spectral gate of SpectFormer: a learned filter, one complex number a frequency and channel.

Patro, Namboodiri, Agneeswaran, "SpectFormer: Frequency and Attention is what you need in a Vision
Transformer" (arXiv 2304.06446), section 3; the filter is that of GFNet. Letters in shapes: B batch, C
channels, H x W the token grid, Wf = W // 2 + 1 kept frequencies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import UserError
from vision.inference import by_images

BACKENDS = ("auto", "fft", "matmul")
# The largest side of a grid on which the four matrix products beat the FFT (`python -m benchmarks.spectformer
# --gate` measures it): they win at 14 x 14 and 28 x 28 and lose at 56 x 56.
MATMUL_SIDE = 28


def dft_matrices(height: int, width: int) -> dict[str, Tensor]:
    """The orthonormal real 2-D DFT and its inverse as four real matrices, float64.

    `rows_in` [2Wf, W] takes a row of W numbers to Wf real, then Wf imaginary parts; `columns_in` [2H, 2H]
    takes interleaved (row, re/im) to all real, then all imaginary parts along H; `columns_out` and
    `rows_out` [W, 2Wf] go back. Columns 0 and (even W) W/2 are real in the output, as the inverse real FFT
    has it: there the imaginary part left after the inverse along H has no weight.
    """
    half = width // 2 + 1
    angle = 2 * math.pi / width * torch.outer(torch.arange(half), torch.arange(width)).double()
    weight = torch.full((half, 1), 2.0, dtype=torch.float64)
    weight[0] = 1
    if width % 2 == 0:
        weight[-1] = 1
    down = 2 * math.pi / height * torch.outer(torch.arange(height), torch.arange(height)).double()
    cos, sin = down.cos() / math.sqrt(height), down.sin() / math.sqrt(height)

    def interleaved(real: Tensor, imaginary: Tensor) -> Tensor:
        return torch.stack([real, imaginary], dim=-1).flatten(1)

    forth = torch.cat([interleaved(cos, sin), interleaved(-sin, cos)])
    back = torch.cat([weight * angle.cos(), -weight * angle.sin()])
    return {
        "rows_in": torch.cat([angle.cos(), -angle.sin()]) / math.sqrt(width),
        "columns_in": forth,
        "columns_out": forth.T.contiguous(),  # cosines and sines are symmetric: the transpose runs back
        "rows_out": back.T.contiguous() / math.sqrt(width),
    }


def matrices_for(grid: tuple[int, int], like: Tensor) -> dict[str, Tensor]:
    """`dft_matrices` of the type and on the device of a tensor."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return {k: m.to(like) for k, m in dft_matrices(*grid).items()}
    return _kept_matrices(grid, like.dtype, like.device)


@functools.lru_cache(maxsize=16)
def _kept_matrices(grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    with torch.inference_mode(False):
        return {k: m.to(device, dtype) for k, m in dft_matrices(*grid).items()}


def resize_filter(weight: Tensor, grid: tuple[int, int], method: str = "bicubic") -> Tensor:
    """A filter `[h, w, C, 2]` for another token grid (H, W): `[H, W // 2 + 1, C, 2]`.

    `bicubic` is the published conversion: real and imaginary parts are stretched with aligned corners.
    `spectrum` keeps every frequency (in cycles per image) and fills new ones with zeros: going up and back
    gives the filter back.
    """
    height, half = grid[0], grid[1] // 2 + 1
    if weight.shape[:2] == (height, half):
        return weight
    if method == "bicubic":
        flat = weight.flatten(2).permute(2, 0, 1)[None]
        flat = F.interpolate(flat, (height, half), mode="bicubic", align_corners=True)
        return flat[0].permute(1, 2, 0).unflatten(2, weight.shape[2:]).contiguous()
    if method != "spectrum":
        raise UserError(f"a spectral filter is resized by 'bicubic' or 'spectrum', not {method!r}")
    rows, columns = min(height, weight.shape[0]), min(half, weight.shape[1])
    positive, negative = (rows + 1) // 2, rows // 2
    resized = weight.new_zeros(height, half, *weight.shape[2:])
    resized[:positive, :columns] = weight[:positive, :columns]
    if negative:
        resized[-negative:, :columns] = weight[-negative:, :columns]
    return resized


class SpectralGate(nn.Module):
    """Filter a token map in the frequency domain: `[B, N, C]` -> `[B, N, C]`, N = H * W row-major.

    y = irfft2(rfft2(x) * weight), orthonormal; equally a circular convolution with `kernel()`. Always in
    float32 (float64 for float64 input); under autocast the result stays float32. On another grid than its
    own the weight is resized (`resize_filter`), at every call: `set_grid` does it for good.

    Two forms give the same numbers: the FFT, and four products with constant DFT matrices, which every
    exporter can write. `auto` trains with the FFT, exports as matmul, and infers with what is faster for
    the grid.

    Args:
        grid: rows and columns of the tokens.
        backend: auto, fft or matmul.
    """

    def __init__(self, channels: int, grid: tuple[int, int], backend: str = "auto") -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise UserError(f"spectral gate: backend={backend!r} is unknown, choose one of {BACKENDS}")
        self.grid, self.backend = grid, backend
        self.complex_weight = nn.Parameter(0.02 * torch.randn(grid[0], grid[1] // 2 + 1, channels, 2))
        self.matrices: dict[str, Tensor] = {}
        self.parts: tuple[Tensor, Tensor] | None = None  # of a weight that will not change any more
        self.settle()

    def settle(self) -> None:
        """Bring the constants to the weight's device, and the weight to plain memory order.

        The matrices are no buffers: `.half()` would round them, though the gate computes in float32.
        """
        weight = self.complex_weight
        if not weight.is_contiguous():  # channels_last permutes a 4-D parameter
            weight.data = weight.data.contiguous()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.matrices = {k: m.to(weight.device, dtype) for k, m in dft_matrices(*self.grid).items()}
        if self.parts is not None:
            self.freeze()

    def freeze(self) -> None:
        """Keep the weight's real and imaginary part apart, for inference; the weight must not change any more."""
        self.parts = real_and_imaginary(self.complex_weight.detach().to(self.matrices["rows_in"].dtype))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SpectralGate:
        super()._apply(fn, recurse)
        self.settle()
        return self

    def set_grid(self, grid: tuple[int, int], method: str = "bicubic") -> None:
        """Resize the weight to another token grid."""
        self.grid = grid
        self.complex_weight = nn.Parameter(resize_filter(self.complex_weight.detach(), grid, method))
        self.settle()

    def kernel(self) -> Tensor:
        """The real kernel `[H, W, C]` whose circular convolution the gate is (normalised by 1 / HW)."""
        weight = torch.view_as_complex(self.complex_weight.detach().double().contiguous())
        return torch.fft.irfft2(weight, s=self.grid, dim=(0, 1))

    def by_matmul(self, grid: tuple[int, int]) -> bool:
        if self.backend != "auto":
            return self.backend == "matmul"
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return True
        return max(grid) <= MATMUL_SIDE and not self.training

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        grid = grid or self.grid
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            weight = self.complex_weight.to(wide.dtype)
            matrices = self.matrices
            matmul = self.by_matmul(grid)
            if grid != self.grid:
                weight = resize_filter(weight, grid)
                matrices = matrices_for(grid, wide) if matmul else {}
            gate: Callable[[Tensor], Tensor]
            if matmul:
                parts = self.parts if self.parts is not None and grid == self.grid else None
                real, imaginary = parts or real_and_imaginary(weight)
                gate = partial(gate_by_matmul, real=real, imaginary=imaginary, matrices=matrices)
            else:
                gate = partial(gate_by_fft, weight=weight, grid=grid)
            out = by_images(gate, wide, 8 * wide.shape[1] * wide.shape[2])
        return out if autocast else out.to(x.dtype)


def gate_by_fft(x: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, N, C]` tokens, `[H, Wf, C, 2]` weight -> `[B, N, C]`."""
    spectrum = torch.fft.rfft2(x.unflatten(1, grid), dim=(1, 2), norm="ortho")
    spectrum = spectrum * torch.view_as_complex(weight.contiguous())
    return torch.fft.irfft2(spectrum, s=grid, dim=(1, 2), norm="ortho").flatten(1, 2)


def real_and_imaginary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[H, Wf, C, 2]` -> twice `[H, Wf * C]`."""
    real, imaginary = weight.flatten(1, 2).movedim(-1, 0).contiguous().unbind(0)
    return real, imaginary


def gate_by_matmul(x: Tensor, real: Tensor, imaginary: Tensor, matrices: dict[str, Tensor]) -> Tensor:
    """The same by four matrix products in real arithmetic; the weight's parts are `[H, Wf * C]`."""
    batch, _, channels = x.shape
    height, width = len(real), matrices["rows_in"].shape[1]
    half = width // 2 + 1
    z = matrices["rows_in"] @ x.reshape(batch * height, width, channels)
    z = matrices["columns_in"] @ z.view(batch, 2 * height, half * channels)
    re, im = z[:, :height], z[:, height:]
    z = torch.cat([re * real - im * imaginary, re * imaginary + im * real], dim=1)
    z = matrices["columns_out"] @ z
    return (matrices["rows_out"] @ z.view(batch * height, 2 * half, channels)).view(x.shape)
