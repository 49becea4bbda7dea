"""Windows of convolutions and pools: 1-D seen as 2-D, 3-D brought down to it, and automatic padding made explicit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from npucc import ops
from npucc.frontend.node import NodeImport

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows over (height, width), or (depth, height, width). `begins` and `ends` are the pads before and after; `extra` what ceil mode adds
    after those."""

    kernel: Sizes
    strides: Sizes
    dilations: Sizes
    begins: Sizes
    ends: Sizes
    extra: Sizes

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """top, left, bottom, right (of height and width)."""
        return (*self.begins, *(end + extra for end, extra in zip(self.ends, self.extra, strict=True)))  # type: ignore[return-value]

    def spans(self) -> Sizes:
        """Size of a dilated kernel."""
        return tuple(dilation * (kernel - 1) + 1 for dilation, kernel in zip(self.dilations, self.kernel, strict=True))

    def plane(self) -> Windows:
        """Those over height and width alone."""
        return Windows(*(getattr(self, field.name)[-2:] for field in fields(self)))

    def depth(self) -> Windows:
        """Those over depth alone, as over the height of an image."""
        ones = {"kernel": 1, "strides": 1, "dilations": 1}
        return Windows(*((getattr(self, field.name)[0], ones.get(field.name, 0)) for field in fields(self)))


def in_2d(node: NodeImport, tensor: str, apply: Callable[[str], str]) -> str:
    """Run `apply` on the [N, C, H, W] form of a tensor: [N, C, L] is given a height of 1, which is dropped again after."""
    shape = node.shape_of(tensor)
    if len(shape) == 4:
        return apply(tensor)
    if len(shape) != 3:
        raise node.refuse(f"has {len(shape) - 2} spatial dimensions (input shape {list(shape)}); supported are 1 to 3")
    n, c, length = shape
    result = apply(node.reshape(tensor, (n, c, 1, length)))
    n, c, _, length = node.shape_of(result)
    return node.reshape(result, (n, c, length))


def attribute_sizes(node: NodeImport, name: str, default: int) -> Sizes:
    """An attribute of one integer per spatial dimension; a 1-D one is given a height."""
    values = node.integers(name) or [default] * (node.rank() - 2)
    if len(values) != node.rank() - 2:
        raise node.refuse(f"{name}={values} does not fit an input of shape {list(node.shape(0))}", hint="the model is damaged; export it again")
    return as_sizes(values, default)


def as_sizes(values: Sequence[int], missing: int) -> Sizes:
    """One value per spatial dimension; `missing` is the height of a 1-D tensor."""
    return (missing, values[0]) if len(values) == 1 else tuple(values)


def read_windows(node: NodeImport, kernel: Sequence[int]) -> Windows:
    """Kernel, strides, dilations and pads of a Conv or pool node, auto_pad and ceil_mode resolved."""
    size = as_sizes(node.shape(0)[2:], 1)
    none = (0,) * len(size)
    windows = Windows(as_sizes(kernel, 1), attribute_sizes(node, "strides", 1), attribute_sizes(node, "dilations", 1), none, none, none)
    if min(*windows.kernel, *windows.strides, *windows.dilations) < 1:
        raise node.refuse(
            f"kernel {windows.kernel}, strides {windows.strides} and dilations {windows.dilations} must be positive",
            hint="the model is damaged; export it again",
        )
    mode = auto_pad(node)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        same = (_same(size[i], windows.spans()[i], windows.strides[i], upper=mode == "SAME_UPPER") for i in range(len(size)))
        begins, ends = zip(*same, strict=True)
        return replace(windows, begins=begins, ends=ends)
    begins, ends = (none, none) if mode == "VALID" else explicit_pads(node)
    windows = replace(windows, begins=begins, ends=ends)
    if node.integer("ceil_mode", 0) == 1:
        windows = replace(windows, extra=tuple(_ceil_extra(size[i], windows, i) for i in range(len(size))))
    padded = [sum(parts) for parts in zip(size, begins, ends, windows.extra, strict=True)]
    if any(span > each for span, each in zip(windows.spans(), padded, strict=True)):
        raise node.refuse(f"has a kernel that spans {list(windows.spans())} on a padded input of {padded}", hint="check the input shapes")
    return windows


def auto_pad(node: NodeImport) -> str:
    """NOTSET, VALID, SAME_UPPER or SAME_LOWER."""
    mode = node.word("auto_pad", "NOTSET") or "NOTSET"
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise node.refuse(f"auto_pad={mode!r} is not known", hint="the model is damaged; export it again")
    return mode


def explicit_pads(node: NodeImport) -> tuple[Sizes, Sizes]:
    """(before, after) of the `pads` attribute."""
    spatial = node.rank() - 2
    pads = node.integers("pads") or [0] * (2 * spatial)
    if len(pads) != 2 * spatial or min(pads) < 0:
        raise node.refuse(f"pads={pads} must be {2 * spatial} non-negative numbers", hint="the model is damaged; export it again")
    return as_sizes(pads[:spatial], 0), as_sizes(pads[spatial:], 0)


def _same(size: int, span: int, stride: int, *, upper: bool) -> tuple[int, int]:
    total = max(0, (-(-size // stride) - 1) * stride + span - size)
    small, large = total // 2, total - total // 2
    return (small, large) if upper else (large, small)


def _ceil_extra(size: int, windows: Windows, i: int) -> int:
    """Padding after the end that ceil mode implies. The last window must start inside the image or the padding before it."""
    stride, span = windows.strides[i], windows.spans()[i]
    padded = size + windows.begins[i] + windows.ends[i]
    count = -(-(padded - span) // stride) + 1
    if (count - 1) * stride >= size + windows.begins[i]:
        count -= 1
    return max(0, (count - 1) * stride + span - padded)


# ---- volumes


def fold_depth(node: NodeImport, x: str, windows: Windows) -> str:
    """[N, C, D, H, W] as images [N·D', C·kd, H, W]: what each position in the depth sees there becomes channels."""
    n, c, _, h, w = node.shape_of(x)
    (kernel, *_), (stride, *_), (dilation, *_) = windows.kernel, windows.strides, windows.dilations
    before, after = windows.begins[0], windows.ends[0]
    if before or after:
        x = node.emit("pad", (x,), ops.Pad((0, 0, before, 0, 0), (0, 0, after, 0, 0)))
    count = (node.shape_of(x)[2] - windows.spans()[0]) // stride + 1
    taps = [node.slice(x, 2, tap * dilation, count, stride) for tap in range(kernel)]
    stacked = [node.reshape(tap, (n, c, 1, count, h, w)) for tap in taps]
    whole = stacked[0] if kernel == 1 else node.emit("concat", stacked, ops.Concat(2))
    return node.reshape(node.transpose(whole, (0, 3, 1, 2, 4, 5)), (n * count, c * kernel, h, w))


def unfold_depth(node: NodeImport, images: str, batch: int) -> str:
    """Images [N·D, C, H, W] as a volume [N, C, D, H, W]."""
    count, c, h, w = node.shape_of(images)
    return node.transpose(node.reshape(images, (batch, count // batch, c, h, w)), (0, 2, 1, 3, 4))


def pool_volume(node: NodeImport, x: str, windows: Windows, pool: Callable[[str, Windows], str]) -> str:
    """A pool over a volume, as one over height and width and then one over depth."""
    n, c, d, h, w = node.shape_of(x)
    flat = pool(node.reshape(x, (n, c * d, h, w)), windows.plane())
    h, w = node.shape_of(flat)[2:]
    result = pool(node.reshape(flat, (n, c, d, h * w)), windows.depth())
    return node.reshape(result, (n, c, node.shape_of(result)[2], h, w))
