"""The text of a gemm: products of one activation, branches, epilogue on a tile, steps on whole rows at the end.

    Y [M, N] = A [M, K] W^T, BLOCK_M x BLOCK_N of it a program

For few rows SPLIT_K programs share a tile: each writes its sums, the last to arrive adds them in the order of their
parts, so that the result does not depend on who that is, and goes on. Closing steps are run on a block of rows by the
program whose tile completes it.
"""

from __future__ import annotations

from planish.codegen.gemm_loop import Lines, Loop
from planish.codegen.gemm_plan import factor_of, refusal
from planish.codegen.gemm_reference import reference
from planish.codegen.kernel_spec import Branch, Kernel, Product, Step, half_of
from planish.codegen.triton_body import Body, Buffer, Parameter
from planish.codegen.triton_rows import closing
from planish.ir.errors import PlanishError
from planish.kernels.table import ROWS

TILES = "triton.cdiv(M, launch.BLOCK_M) * triton.cdiv(N, launch.BLOCK_N)"


class Gemm(Lines):
    """The writer of one kernel."""

    def __init__(self, kernel: Kernel, dtype: str) -> None:
        super().__init__()
        self.kernel, self.dtype = kernel, dtype
        self.tensors = {t.name: t for t in kernel.tensors}
        self.main = Loop(kernel, dtype, self)
        self._on_rows = {name for step in kernel.closing for name in (*step.reads, *step.writes)}

    # -- the parts in order ------------------------------------------------------------------------

    def write(self) -> None:
        """All lines."""
        kernel, main = self.kernel, self.main
        self.line(f"tile_m, tile_n = {self.call('tile_of')}(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)")
        self.line("first = tile_m * BLOCK_M")
        self.line("across = tile_n * BLOCK_N")
        self.line("m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first)")
        whole = "tl.arange(0, BLOCK_N) if N % BLOCK_N == 0 else " if main.cut.late else ""
        self.line(f"n = {whole}tl.minimum(tl.arange(0, BLOCK_N), N - 1 - across)")
        self.line(f"steps: tl.constexpr = ({main.stored} // BLOCK_K + SPLIT_K - 1) // SPLIT_K")
        self.line("begin = tl.program_id(1) * steps if SPLIT_K > 1 else 0")
        self.line(f"end = tl.minimum(begin + steps, {main.stored} // BLOCK_K) if SPLIT_K > 1 else steps")
        main.setup()
        main.loop()
        self._gather_parts()
        for product in kernel.products:
            self._finish(product)
        self.line("row = first + tl.arange(0, BLOCK_M)")
        self.line("column = across + tl.arange(0, BLOCK_N)")
        self.line("inside = (row < M)[:, None] & (column < N)[None, :]")
        self.line("at = first.to(tl.int64) * N + (tl.arange(0, BLOCK_M)[:, None] * N + column[None, :])")
        self._loaded: dict[str, str] = {}
        for product in kernel.products:
            self._store(product.result)
        for step in kernel.steps:
            self._step(step)
        if kernel.closing:
            self._closing()

    def _gather_parts(self) -> None:
        """The sums of all parts of K, added by the last program to arrive."""
        main, products = self.main, self.kernel.products
        self.line("if SPLIT_K > 1:")
        self.indent += 1
        self.line("slot = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]")
        self.line("own = parts_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_N * BLOCK_M) + slot")
        self.line("apart = tl.num_programs(0).to(tl.int64) * (BLOCK_N * BLOCK_M)")
        for i, product in enumerate(products):
            at = "tl.program_id(1)" + f" * {len(products)} + {i}" * (len(products) > 1)
            self.line(f"tl.store(own + {at if at[-1] == ')' else f'({at})'} * apart, {main.sums(product)})")
        self.line(f"if {self.call('arrived')}(arrivals_ptr + tl.program_id(0)) < SPLIT_K - 1:")
        self.line("    return")
        for i, product in enumerate(products):
            sums = main.sums(product)
            plus = (f" + {i} * apart" if i > 1 else " + apart") if i else ""
            self.line(f'{sums} = tl.load(own{plus}, cache_modifier=".cg")')
            self.line("for part in range(1, SPLIT_K):")
            place = f"(part * {len(products)} + {i})" if len(products) > 1 else "part"
            self.line(f'    {sums} += tl.load(own + {place} * apart, cache_modifier=".cg")')
        self.indent -= 1

    def _finish(self, product: Product) -> None:
        """Scales, zero points of the activation, branches and bias: from sums to the product's result [M, N]."""
        main, w, a = self.main, product.weight, self.main.activation
        sums, result, cut = main.sums(product), self._local(product.result), self.main.cut
        self.line(f"{result} = {sums}.to(tl.float32)" if cut.sums == "tl.int32" else f"{result} = {sums}")
        factor = 1.0 if cut.in_loop else factor_of(self.kernel, cut, w)
        back = f" * {factor**-1!r}" if factor != 1.0 else ""
        if w.scale and not w.group:
            if w.clusters:
                if not cut.on_weight:
                    self.line(f"{result} = {result} * {w.scale}_top[:, None]")
            else:
                self.line(f"{w.scale} = tl.load({w.scale}_ptr + across + n).to(tl.float32)")
                self.line(f"{result} = {result} * {f'({w.scale}{back})' if back else w.scale}[:, None]")
        if a.zero:
            token = a.granularity == "token"
            zero = f"tl.load({a.zero}_ptr{' + first + m' if token else ''}).to(tl.float32)"
            self.line(f"{w.sums} = tl.load({w.sums}_ptr + across + n)")
            self.line(f"{result} = {result} - {zero}{'[None, :]' if token else ''} * {w.sums}[:, None]")
        if a.kind == "codes" and not a.group:
            token = a.granularity == "token"
            scale = f"tl.load({a.scale}_ptr{' + first + m' if token else ''})"
            self.line(f"{result} = {result} * {scale}{'[None, :]' if token else ''}")
        for branch in product.branches:
            self._branch(branch, result)
        self.line(f"{result} = tl.trans({result})")
        if product.bias:
            self.line(f"{result} = {result} + {self._vector(product.bias)}")

    def _branch(self, branch: Branch, result: str) -> None:
        """result [BLOCK_N, BLOCK_M] += right left^T, `chunk` columns of the rank at a time."""
        rank, chunk = branch.rank, 16
        while chunk < min(rank, 64):
            chunk *= 2
        left = f"{branch.left}_ptr + first.to(tl.int64) * {rank}"
        right = f"{branch.right}_ptr + across.to(tl.int64) * {rank}"
        self.line(f"{result} = {self.call('low_rank_up')}({result}, {left}, {right}, m, n, {rank}, {chunk})")

    # -- the epilogue ------------------------------------------------------------------------------

    def _vector(self, name: str) -> str:
        """A border vector [N] or a scalar beside a tile, float32."""
        tensor = self.tensors[name]
        wide = "" if tensor.dtype == "f32" else ".to(tl.float32)"
        if not tensor.shape:
            return f"tl.load({name}_ptr){wide}"
        return f"tl.load({name}_ptr + across + n){wide}[None, :]"

    def _local(self, name: str) -> str:
        """The name of a local on this tile: closing steps have locals of their own, on whole rows."""
        return f"{name}_tile" if name in self._on_rows else name

    def _operand(self, name: str) -> str:
        """A local, or what a border tensor holds for this tile."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.role in ("output", "scratch"):
            return self._local(name)
        if name not in self._loaded:
            self._loaded[name] = f"{name}_tile"
            if "M" in tensor.shape:
                self.line(f"{name}_tile = tl.load({name}_ptr + at, mask=inside, other=0.0).to(tl.float32)")
            else:
                self.line(f"{name}_tile = {self._vector(name)}")
        return self._loaded[name]

    def _store(self, name: str) -> None:
        """Store a local that is an output or that closing steps read."""
        tensor = self.tensors.get(name)
        if tensor is not None:
            self.line(f"tl.store({name}_ptr + at, {self._local(name)}.to({name}_ptr.dtype.element_ty), mask=inside)")

    def _step(self, step: Step) -> None:
        row = ROWS[step.row]
        if row.text:
            options = dict(step.options)
            for name in row.chosen(options).device:
                self.call(name)
            operands = [self._operand(name) for name in step.reads]
            self.line(f"{self._local(step.writes[0])} = {row.expression(operands, options)}")
            self._store(step.writes[0])
        elif step.row in ("quantize_static", "quantize_group"):
            self._quantise(step)
        else:
            raise PlanishError(f"step '{step.row}': it needs whole rows; expected it among the closing steps")

    def _quantise(self, step: Step) -> None:
        """Codes of the tile; columns beyond N count in no range and are stored as 0 up to the padding."""
        options, codes = dict(step.options), step.writes[0]
        bits, low, high = int(options["bits"]), float(options["low"]), float(options["high"])
        stored = int(self.tensors[codes].shape[-1])
        self.line(f"{codes} = tl.where((column < N)[None, :], {self._operand(step.reads[0])}, 0.0)")
        if step.row == "quantize_static":
            scale, zero = (self._operand(name) if name else "0.0" for name in (*step.reads, "")[1:3])
            self.line(f"{codes} = {self.call('static_codes')}({codes}, {scale}, {zero}, {low}, {high})")
            if len(step.reads) > 2 and step.reads[2]:
                self.line(f"{codes} = tl.where((column < N)[None, :], {codes}, 0)")
        else:
            group, scale, count = int(options["group"]), step.writes[1], int(self.tensors[step.writes[1]].shape[-1])
            arguments = f"BLOCK_M, BLOCK_N, {group}, {float(options['levels'])}, {low}, {high}"
            self.line(f"{codes}, {scale} = {self.call('group_codes')}({codes}, {arguments})")
            self.line(f"group = across // {group} + tl.arange(0, BLOCK_N // {group})")
            self.line(f"there = (row < M)[:, None] & (group < {count})[None, :]")
            self.line(
                f"tl.store({scale}_ptr + row[:, None].to(tl.int64) * {count} + group[None, :], {scale}, mask=there)"
            )
        if bits == 8:
            self.line("byte = column")
        else:
            packed = f"{self.call('pack_halves')}({codes}, BLOCK_M, BLOCK_N, {half_of(bits)})"
            self.line(f"{codes} = {packed}")
            self.line(f"byte = across // {8 // bits} + tl.arange(0, BLOCK_N // {8 // bits})")
        self.line(f"there = (row < M)[:, None] & (byte < {stored})[None, :]")
        place = f"row[:, None].to(tl.int64) * {stored} + byte[None, :]"
        self.line(f"tl.store({codes}_ptr + {place}, {codes}.to(tl.int8), mask=there)")

    def _closing(self) -> None:
        """The row program, run by the program that stores the last tile of a block of rows."""
        self.line(f"if {self.call('arrived')}(finished_ptr + tile_m) == tl.cdiv(N, BLOCK_N) - 1:")
        lines, functions = closing(self.kernel.closing, self.kernel.tensors, self.kernel.outputs, self.indent + 1)
        self.lines += lines
        for name in functions:
            self.call(name)


# -- around it -----------------------------------------------------------------------------------


def _tile_rule(kernel: Kernel) -> int:
    """What BLOCK_N must be a multiple of: spans and groups of the codes that the epilogue makes."""
    least = 16
    for step in kernel.steps:
        if step.row.startswith("quantize"):
            least = max(least, 64, int(dict(step.options).get("group", 0)))
    return least


def _parameters(kernel: Kernel, main: Loop) -> tuple[Parameter, ...]:
    least = _tile_rule(kernel)
    blocks = tuple(b for b in (16, 32, 64, 128, 256) if b % least == 0)
    default = 128 if 128 in blocks else blocks[0]
    found = [
        Parameter("BLOCK_M", 64, "BLOCK_M in (16, 32, 64, 128, 256)", "rows of a tile"),
        Parameter("BLOCK_N", default, f"BLOCK_N in {blocks}", "columns of a tile"),
        Parameter("BLOCK_K", main.cut.steps[0], f"BLOCK_K in {main.cut.steps}", "columns of the operands at a time"),
        Parameter("SPLIT_K", 1, "SPLIT_K in (1, 2, 4, 8, 16)", "programs that share a tile"),
        Parameter("GROUP_M", 8, "GROUP_M >= 1", "row blocks that are swept together"),
    ]
    if kernel.closing:
        width = 1 << max(kernel.outputs - 1, 1).bit_length()
        rows = max(1, min(16, 4096 // width))
        sizes = "(1, 2, 4, 8, 16, 32, 64, 128)"
        found.append(
            Parameter("ROWS", rows, f"ROWS in {sizes} and BLOCK_M % ROWS == 0", "rows at a time, in closing steps")
        )
    return tuple(found)


def _buffers(kernel: Kernel, main: Loop) -> tuple[Buffer, ...]:
    kind = "int32" if main.cut.sums == "tl.int32" else "float32"
    size = f"launch.SPLIT_K * {len(kernel.products)} * {TILES} * launch.BLOCK_M * launch.BLOCK_N"
    found = [
        Buffer("parts", kind, f"{size} if launch.SPLIT_K > 1 else 1", zeroed=False),
        Buffer("arrivals", "int32", f"{TILES} if launch.SPLIT_K > 1 else 1"),
    ]
    if kernel.closing:
        found.append(Buffer("finished", "int32", "triton.cdiv(M, launch.BLOCK_M)"))
    return tuple(found)


def body(kernel: Kernel, dtype: str) -> Body:
    """The body of a gemm.

    Args:
        dtype: the kernel's float: "f16", "bf16" or "f32".

    Raises:
        PlanishError: a kernel that `gemm_plan.refusal` refuses.
    """
    why = refusal(kernel)
    if why:
        raise PlanishError(f"gemm: cannot be written: {why}")
    writer = Gemm(kernel, dtype)
    writer.write()
    parameters, buffers = _parameters(kernel, writer.main), _buffers(kernel, writer.main)
    names = [*(f"{t.name}_ptr" for t in kernel.tensors), *(f"{b.name}_ptr" for b in buffers), "M"]
    names += [f"{p.name}: tl.constexpr" for p in parameters]
    head = "\n".join(["def kernel(", *(f"    {name}," for name in names), "):"])
    lines, references = reference(kernel, dtype)
    return Body(
        kernel="\n".join(["@triton.jit", head, *writer.lines]),
        functions=tuple(writer.functions),
        reference="\n".join(lines),
        references=references,
        grid=f"({TILES}, launch.SPLIT_K)",
        parameters=parameters,
        buffers=buffers,
        constants=(("N", kernel.outputs),),
    )
