"""Windows of convolutions and pools: 1-D seen as 2-D, and automatic padding made explicit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from npucc.frontend.node import NodeImport

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows over (height, width). `begins` and `ends` are the pads before and after; `extra` what ceil mode adds after those."""

    kernel: Pair
    strides: Pair
    dilations: Pair
    begins: Pair = (0, 0)
    ends: Pair = (0, 0)
    extra: Pair = (0, 0)

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """top, left, bottom, right."""
        return (*self.begins, self.ends[0] + self.extra[0], self.ends[1] + self.extra[1])

    def spans(self) -> Pair:
        """Size of a dilated kernel."""
        return (self.dilations[0] * (self.kernel[0] - 1) + 1, self.dilations[1] * (self.kernel[1] - 1) + 1)


def in_2d(node: NodeImport, tensor: str, apply: Callable[[str], str]) -> str:
    """Run `apply` on the [N, C, H, W] form of a tensor: [N, C, L] is given a height of 1, which is dropped again after."""
    shape = node.shape_of(tensor)
    if len(shape) == 4:
        return apply(tensor)
    if len(shape) != 3:
        raise node.refuse(f"has {len(shape) - 2} spatial dimensions (input shape {list(shape)}); supported are 1 and 2")
    n, c, length = shape
    result = apply(node.reshape(tensor, (n, c, 1, length)))
    n, c, _, length = node.shape_of(result)
    return node.reshape(result, (n, c, length))


def pair(node: NodeImport, name: str, default: int, *, missing: int | None = None) -> Pair:
    """An attribute of one or two integers as (height, width); `missing` fills the height of a 1-D one."""
    values = node.integers(name) or [default] * (node.rank() - 2)
    if len(values) != node.rank() - 2:
        raise node.refuse(f"{name}={values} does not fit an input of shape {list(node.shape(0))}", hint="the model is damaged; export it again")
    return as_pair(values, default if missing is None else missing)


def as_pair(values: Sequence[int], missing: int) -> Pair:
    """One or two values as (height, width); `missing` is the height of a 1-D one."""
    return (missing, values[0]) if len(values) == 1 else (values[0], values[1])


def read_windows(node: NodeImport, kernel: Sequence[int]) -> Windows:
    """Kernel, strides, dilations and pads of a Conv or pool node, auto_pad and ceil_mode resolved."""
    size = as_pair(node.shape(0)[2:], 1)
    windows = Windows(as_pair(kernel, 1), pair(node, "strides", 1), pair(node, "dilations", 1))
    if min(*windows.kernel, *windows.strides, *windows.dilations) < 1:
        raise node.refuse(
            f"kernel {windows.kernel}, strides {windows.strides} and dilations {windows.dilations} must be positive",
            hint="the model is damaged; export it again",
        )
    mode = auto_pad(node)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = zip(*(_same(size[i], windows.spans()[i], windows.strides[i], upper=mode == "SAME_UPPER") for i in (0, 1)), strict=True)
        return Windows(windows.kernel, windows.strides, windows.dilations, begins, ends)
    begins, ends = ((0, 0), (0, 0)) if mode == "VALID" else explicit_pads(node)
    extra = (0, 0)
    if node.integer("ceil_mode", 0) == 1:
        extra = (_ceil_extra(size[0], windows, begins, ends, 0), _ceil_extra(size[1], windows, begins, ends, 1))
    spans, padded = windows.spans(), (size[0] + begins[0] + ends[0] + extra[0], size[1] + begins[1] + ends[1] + extra[1])
    if spans[0] > padded[0] or spans[1] > padded[1]:
        raise node.refuse(f"has a kernel that spans {list(spans)} on a padded input of {list(padded)}", hint="check the input shapes")
    return Windows(windows.kernel, windows.strides, windows.dilations, begins, ends, extra)


def auto_pad(node: NodeImport) -> str:
    """NOTSET, VALID, SAME_UPPER or SAME_LOWER."""
    mode = node.word("auto_pad", "NOTSET") or "NOTSET"
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise node.refuse(f"auto_pad={mode!r} is not known", hint="the model is damaged; export it again")
    return mode


def explicit_pads(node: NodeImport) -> tuple[Pair, Pair]:
    """(before, after) of the `pads` attribute."""
    spatial = node.rank() - 2
    pads = node.integers("pads") or [0] * (2 * spatial)
    if len(pads) != 2 * spatial or min(pads) < 0:
        raise node.refuse(f"pads={pads} must be {2 * spatial} non-negative numbers", hint="the model is damaged; export it again")
    return as_pair(pads[:spatial], 0), as_pair(pads[spatial:], 0)


def _same(size: int, span: int, stride: int, *, upper: bool) -> Pair:
    total = max(0, (-(-size // stride) - 1) * stride + span - size)
    small, large = total // 2, total - total // 2
    return (small, large) if upper else (large, small)


def _ceil_extra(size: int, windows: Windows, begins: Pair, ends: Pair, i: int) -> int:
    """Padding after the end that ceil mode implies. The last window must start inside the image or the padding before it."""
    stride, span = windows.strides[i], windows.spans()[i]
    padded = size + begins[i] + ends[i]
    count = -(-(padded - span) // stride) + 1
    if (count - 1) * stride >= size + begins[i]:
        count -= 1
    return max(0, (count - 1) * stride + span - padded)
