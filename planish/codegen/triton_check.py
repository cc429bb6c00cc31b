"""The self-check of an emitted file: random data, the comparison with the eager reference, `main`.

The bound of the comparison holds for any kernel and is loose; `tests/kernel_oracle.py` derives one for each element.
"""

from __future__ import annotations

from collections.abc import Sequence

from planish.codegen.cost import dtype_of
from planish.codegen.kernel_spec import Kernel, Tensor
from planish.codegen.triton_example import filling

TORCH = {
    "i8": "int8", "u8": "uint8", "i16": "int16", "i32": "int32", "i64": "int64", "bool": "bool",
    "f16": "float16", "bf16": "bfloat16", "f32": "float32",
}  # fmt: skip


def _names(tensors: Sequence[Tensor]) -> str:
    """A tuple of their names, as Python."""
    return f"({', '.join(chr(34) + t.name + chr(34) for t in tensors)}{',' if len(tensors) == 1 else ''})"


def example_text(kernel: Kernel, dtype: str) -> tuple[str, tuple[str, ...]]:
    """The function that makes random data, and the eager functions that it calls."""
    made, functions = filling(kernel)
    lines = []
    if any("rows(" in text for _, text in made):
        lines += [ROWS, "", ""]
    lines += [
        "def example(M: int, seed: int, device: str) -> dict[str, torch.Tensor]:",
        '    """Random inputs and weights."""',
        "    g = torch.Generator().manual_seed(seed)",
        "    made = {",
    ]
    lines += [f'        "{t.name}": {text}.to(torch.{TORCH[dtype_of(t, dtype)]}),' for t, text in made]
    lines += ["    }", "    return {name: held.to(device) for name, held in made.items()}"]
    return "\n".join(lines), functions


ROWS = '''\
def rows(g: torch.Generator, *size: int) -> torch.Tensor:
    """Random rows, in turn: normal, zero, huge, all negative."""
    x, turn = torch.randn(size, generator=g), torch.arange(size[0])[:, None] % 4
    return torch.where(turn == 3, -x.abs(), x * torch.tensor([1.0, 0.0, 16.0, 1.0])[turn])'''


def check_text(kernel: Kernel) -> str:
    """The function that compares a kernel with its reference on random data."""
    outputs = [t for t in kernel.tensors if t.role == "output"]
    names = _names(outputs)
    packed = [t for t in outputs if t.packed > 1]
    terms = kernel.columns + sum(b.rank for p in kernel.products for b in p.branches)
    a = kernel.activation
    rounds = a is not None and any(
        p.weight.clusters or (a.kind == "float" and p.weight.decoder != "float") for p in kernel.products
    )
    of = "size" if rounds else "b.abs()"
    why = "\n    Decoded weights are rounded to the kernel's float before they are multiplied." if rounds else ""
    unpacked = f"""
            if name in {_names(packed)}:
                a, b = (torch.cat([c.view(torch.uint8) & 15, c.view(torch.uint8) >> 4]) for c in (a, b))"""
    return f'''\
def differences(M: int, seed: int, device: str, launch: Launch | None = None) -> list[str]:
    """What differs between the kernel and its reference by more than rounding explains; [] if nothing does.

    Both add the same {terms} products in float32, in different orders, and round once to the result's dtype. Codes may
    differ by one where a value lies on a border between two: in one place of fifty at most.{why}
    """
    held = example(M, seed, device)
    one, other = run(**held, launch=launch), reference(**held)
    found = []
    for name, a, b in zip({names}, *(made if isinstance(made, tuple) else (made,) for made in (one, other))):
        if a.dtype.is_floating_point:
            rounding = torch.finfo(a.dtype).eps
            a, b = a.double(), b.double()
            size = b.abs().nan_to_num(posinf=0.0)
            size = size.amax(-1, keepdim=True) if b.ndim > 1 else size
            bad = ~((a == b) | ((a - b).abs() <= 2 * rounding * {of} + {terms + 64} * 2.0**-23 * size))
        else:{unpacked if packed else ""}
            far = (a.int() - b.int()).abs()
            bad = far > (1 if (far > 0).double().mean() <= 0.02 else 0)
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            found.append(f"{{name}}{{list(at)}}: kernel {{a[at].item()}}, reference {{b[at].item()}}")
    return found'''


MAIN = '''\
def tune(M: int, device: str = "cuda") -> Launch:
    """The fastest launch that is known for this device, timed on it with so many rows; `run` takes it from now on."""
    held, target = example(M, 0, device), target_of(torch.device(device))
    known = dict.fromkeys([*(launch for _, launch in CONFIGS.get(target, ())), Launch()])
    times = {launch: triton.testing.do_bench(lambda: run(**held, launch=launch)) for launch in known}
    TUNED[target, M] = min(times, key=times.__getitem__)
    return TUNED[target, M]


def main() -> int:
    """Compare on random data; 1 if anything differs, 2 if there is nothing to run the kernel on."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        print("no GPU: set TRITON_INTERPRET=1 to compare in Triton's interpreter")
        return 2
    device = "cpu" if interpreted else "cuda"
    found = [f"M = {M}: {line}" for M in (1, 7, 33) for line in differences(M, M, device)]
    print("\\n".join(found) or f"equal to the reference, {'in the interpreter' if interpreted else 'on the GPU'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())'''
