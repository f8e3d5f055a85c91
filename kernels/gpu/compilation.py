"""Which variants of kernels there are, and whether one is compiled when none should be.

Knows them by what Triton calls when it compiles or finds something in its cache. Where kernels are interpreted nothing is
compiled, and a launch for which a GPU would need a new variant counts as if it were.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
import triton

from vivace.kernels.compilation import CompiledAfterReady, Variant
from vivace.kernels.gpu.tuned import Config

DIVISOR = 16  # what Triton tells pointers and whole numbers apart by
_log = logging.getLogger(__name__)


class Watch:
    """See `kernels.compilation.Compilation`. Of several in a process the last is told: Triton has one listener."""

    def __init__(self) -> None:
        self.compiled: dict[Variant, Any] = {}  # Triton's own object, None where there is none
        self.num_compiled = 0
        self.num_compiled_after_ready = 0
        self._is_sealed = False
        self._is_strict = False
        triton.knobs.compilation.listener = self._listen

    @property
    def variants(self) -> list[Variant]:
        """In the order in which they were met."""
        return list(self.compiled)

    def seal(self, strict: bool) -> None:
        """See `kernels.compilation.Compilation`."""
        self._is_sealed, self._is_strict = True, strict

    def late(self, what: str) -> None:
        """Count and report what should have happened before serving started, if it has started."""
        if not self._is_sealed:
            return
        self.num_compiled_after_ready += 1
        if self._is_strict:
            raise CompiledAfterReady(what)
        _log.warning("after ready: %s", what)

    def list_only(self) -> None:
        """Have this process compile nothing: variants are noted down, and there is nothing to launch."""
        triton.knobs.runtime.jit_cache_hook = self._list

    def note_compiled(self, kernel: Any) -> None:
        """Triton's object for a launch: what it has just compiled, or had."""
        source, metadata = kernel.src, kernel.metadata
        options = metadata.num_warps, metadata.num_stages
        variant = _variant(source.fn, source.signature, source.constants, source.attrs, *options)
        self.compiled.setdefault(variant, kernel)

    def note_interpreted(
        self, kernel: Any, args: tuple[Any, ...], constexprs: Mapping[str, Any], config: Config
    ) -> None:
        """What a GPU would need for this launch."""
        given = {**constexprs, **config.tiles}
        whole = kernel.kwargs["do_not_specialize"] or ()
        names = [name for name in kernel.arg_names if name not in given]
        variant = Variant(
            op=_op(kernel.fn.__module__),
            kernel=kernel.fn.__name__,
            constexprs=tuple(sorted(given.items())),
            arguments=tuple(
                _kind(arg, name in whole) for name, arg in zip(names, args, strict=True)
            ),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if variant not in self.compiled:
            self.compiled[variant] = None
            self.late(f"a GPU would have to compile {variant}")

    def _list(
        self,
        *,
        key: str,
        repr: str,
        fn: Any,
        compile: Mapping[str, Any],
        is_manual_warmup: bool,
        already_compiled: bool,
    ) -> bool:
        """Triton's hook before it compiles; True: it shall not."""
        options = compile["num_warps"], compile["num_stages"]
        facts = compile["signature"], compile["constants"], compile["configs"][0]
        self.compiled[_variant(fn.jit_function, *facts, *options)] = None
        return True

    def _listen(
        self, *, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool
    ) -> None:
        """Triton's hook after it compiled a kernel, or found it on disk."""
        if not cache_hit:
            self.num_compiled += 1
            options = metadata["num_warps"], metadata["num_stages"]
            variant = _variant(src.fn, src.signature, src.constants, src.attrs, *options)
            self.late(f"compiled {variant}")


def _variant(
    function: Any,
    signature: Mapping[str, str],
    constants: Mapping[tuple[int, ...], Any],
    attributes: Mapping[tuple[int, ...], Any],
    num_warps: int,
    num_stages: int,
) -> Variant:
    """By what Triton knows of a kernel. A whole number that is 1 in the launch is one of its constexprs."""
    names = function.arg_names
    return Variant(
        op=_op(function.module),
        kernel=function.__name__,
        constexprs=tuple(
            sorted((names[path[0]], value) for path, value in constants.items() if len(path) == 1)
        ),
        arguments=tuple(
            str(kind) + (f":{DIVISOR}" if attributes.get((names.index(name),)) else "")
            for name, kind in signature.items()
            if kind != "constexpr"
        ),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _op(module: str) -> str:
    """`linear` of `vivace.kernels.linear.triton`."""
    return module.split(".")[-2]


def _kind(arg: Any, is_whole: bool) -> str:
    """What a GPU's Triton would tell this argument of an interpreted launch by."""
    if isinstance(arg, torch.Tensor):
        mark = "" if arg.data_ptr() % DIVISOR else f":{DIVISOR}"
        return f"*{arg.dtype}{mark}"
    if isinstance(arg, bool) or not isinstance(arg, int):
        return type(arg).__name__
    width = "i32" if -(2**31) <= arg < 2**31 else "i64"
    if is_whole:
        return width
    return "1" if arg == 1 else f"{width}:{DIVISOR}" if arg % DIVISOR == 0 else width
