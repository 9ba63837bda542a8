"""Which parts of a model a stage trains: names of modules, chosen before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from plumbline_api.errors import InputError
from plumbline_api.training import Freeze, Lora


@dataclass(frozen=True)
class ModuleNames:
    """The modules of a model that a stage may name."""

    linear: tuple[str, ...]
    """Every linear layer but the output head: what an adapter can change."""
    weighted: tuple[str, ...]
    """Every module that holds weights of its own, the head and the embeddings among them."""
    inner: tuple[str, ...]
    """Modules that hold others."""
    blocks: tuple[str, ...]
    """The transformer blocks, first to last; empty where they are not found."""
    tied: tuple[str, ...] = ()
    """Embeddings and head, where they are one weight."""
    head: tuple[str, ...] = ()
    """The output head, where it is a weight of its own."""
    sizes: tuple[int, ...] = ()
    """Weights of each of `weighted`."""


@dataclass(frozen=True)
class Selection:
    """What is trained, by full names."""

    adapted: tuple[str, ...]
    saved: tuple[str, ...]
    """Modules that are trained whole beside the adapter."""
    frozen: tuple[str, ...]
    """Modules that stay as they are with everything in them."""


@dataclass(frozen=True)
class Trained:
    """How much of a model learns."""

    whole: int
    """Weights that are trained themselves."""
    adapted: float
    """Share of the layers named for an adapter that have one, the others being frozen."""
    blocks: int
    """Blocks from the lowest in which something learns to the top: those below keep nothing for the backward pass."""


def module_names(model: Any) -> ModuleNames:
    """The names of a model's modules; its weights may be on the meta device."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    modules = [(name, module) for name, module in model.named_modules() if name]
    named = {id(module): name for name, module in modules}
    tied = head is not None and embeddings is not None and getattr(head, "weight", None) is embeddings.weight
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [module for _, module in modules if isinstance(module, nn.ModuleList) and len(module) == count]
    weighted = [(name, module) for name, module in modules if next(module.parameters(recurse=False), None) is not None]
    return ModuleNames(
        linear=tuple(name for name, module in modules if isinstance(module, nn.Linear | Conv1D) and module is not head),
        weighted=tuple(name for name, _ in weighted),
        inner=tuple(name for name, module in modules if next(module.children(), None) is not None),
        blocks=tuple(named[id(block)] for block in stacks[0]) if stacks else (),
        tied=tuple(sorted(named[id(module)] for module in (embeddings, head))) if tied else (),
        head=(named[id(head)],) if head is not None and not tied else (),
        sizes=tuple(sum(weight.numel() for weight in module.parameters(recurse=False)) for _, module in weighted),
    )


def select(names: ModuleNames, lora: Lora | None, freeze: Freeze | None) -> Selection:
    """Find what a stage names.

    Raises:
        InputError: naming the field, its value and what would fit.
    """
    frozen = _frozen(names, freeze) if freeze is not None else ()
    if lora is None:
        if all(_is_within(name, frozen) for name in names.weighted):
            raise InputError("freeze: nothing is left to train. Name fewer layers or modules")
        return Selection((), (), frozen)
    saved = _saved(names, lora.modules_to_save or [], frozen)
    adapted = _adapted(names, lora.targets, saved)
    left = tuple(name for name in adapted if not _is_within(name, frozen))
    if not left:
        raise InputError(
            "freeze: every layer that lora would adapt is frozen. Name fewer layers or modules, or other lora.targets"
        )
    return Selection(left, saved, frozen)


def trained_parts(names: ModuleNames, lora: Lora | None, freeze: Freeze | None) -> Trained:
    """How much of a model a stage trains.

    Raises:
        InputError: as `select`.
    """
    chosen = select(names, lora, freeze)
    if lora is None:
        whole = {name for name in names.weighted if not _is_within(name, chosen.frozen)}
    else:
        whole = set(chosen.saved)
    counted = whole - set(names.tied[1:])
    asked = 1 if lora is None else len(_adapted(names, lora.targets, chosen.saved))
    return Trained(
        whole=sum(size for name, size in zip(names.weighted, names.sizes, strict=True) if name in counted),
        adapted=0.0 if lora is None else len(chosen.adapted) / asked,
        blocks=_blocks_above(names, whole | set(chosen.adapted)),
    )


def _blocks_above(names: ModuleNames, learning: set[str]) -> int:
    """Blocks from the lowest in which one of some modules lies to the top; all of them where it lies before them."""
    above, seen = len(names.blocks), False
    for name in names.weighted:  # in the order of the forward pass: embeddings, blocks, the last norm, the head
        inside = next((number for number, block in enumerate(names.blocks) if _is_within(name, (block,))), None)
        if inside is not None:
            above, seen = len(names.blocks) - inside, True
        elif seen:
            above = 0
        if name in learning:
            return above
    return 0


def refuse_unread_head(names: ModuleNames, lora: Lora | None) -> None:
    """A reward model reads scalar heads in the place of the vocabulary's.

    Raises:
        InputError: if that one is to be trained all the same.
    """
    wanted = [] if lora is None else lora.modules_to_save or []
    for name in wanted:
        if any(is_named(head, name) for head in names.head):
            raise InputError(
                f'lora.modulesToSave: "{name}" is the head over the vocabulary, which a reward model does not read. '
                "Leave it out"
            )


def _adapted(names: ModuleNames, targets: list[str] | None, saved: tuple[str, ...]) -> tuple[str, ...]:
    if not names.linear:
        raise InputError("lora: the model has no linear layers to adapt. Train all weights: leave lora out")
    if targets is None:
        return tuple(sorted(set(names.linear) - set(saved)))
    chosen: set[str] = set()
    for target in targets:
        matched = {name for name in names.linear if is_named(name, target)}
        if not matched:
            there = any(is_named(name, target) for name in (*names.weighted, *names.inner))
            why = "is not a linear layer of the blocks" if there else "matches no layer of the model"
            hint = (
                " Train it whole with lora.modulesToSave." if any(is_named(n, target) for n in names.weighted) else ""
            )
            raise InputError(f'lora.targets: "{target}" {why}.{hint} There are: {_shown(names.linear)}')
        if both := sorted(matched & set(saved)):
            raise InputError(
                f'lora.modulesToSave: "{both[0]}" is among lora.targets, too ("{target}"). A module is adapted or '
                "trained whole: name it once"
            )
        chosen |= matched
    return tuple(sorted(chosen))


def _saved(names: ModuleNames, wanted: list[str], frozen: tuple[str, ...]) -> tuple[str, ...]:
    chosen: set[str] = set()
    for name in wanted:
        matched = {module for module in names.weighted if is_named(module, name)}
        if not matched:
            inner = any(is_named(module, name) for module in names.inner)
            why = "holds modules, not weights; name those in it" if inner else "matches no module of the model"
            raise InputError(f'lora.modulesToSave: "{name}" {why}. There are: {_shown(names.weighted)}')
        still = sorted(module for module in matched if _is_within(module, frozen))
        if still:
            raise InputError(f'lora.modulesToSave: "{still[0]}" is frozen by freeze. Leave it out of one of the two')
        chosen |= matched
    missing = sorted(set(names.tied) - chosen)
    if missing and chosen & set(names.tied):
        # Training one of the two would untie them, and a reader that trusts tie_word_embeddings would undo it.
        first, second = (name.rpartition(".")[2] for name in names.tied)
        raise InputError(
            f"lora.modulesToSave: the embeddings and the output head of this model are one weight "
            f"(tie_word_embeddings), so one cannot be trained without the other. Name both: [{first}, {second}]"
        )
    return tuple(sorted(chosen))


def _frozen(names: ModuleNames, freeze: Freeze) -> tuple[str, ...]:
    if freeze.layers and abs(freeze.layers) > len(names.blocks):
        raise InputError(f"freeze.layers: {freeze.layers}, but the model has {len(names.blocks)} blocks")
    chosen = set(names.blocks[: freeze.layers]) if freeze.layers else set()
    for pattern in freeze.modules:
        matched = {name for name in (*names.weighted, *names.inner) if is_named(name, pattern)}
        if not matched:
            raise InputError(
                f'freeze.modules: "{pattern}" matches no module of the model. There are: {_shown(names.weighted)}'
            )
        chosen |= matched
    if chosen & set(names.tied):
        chosen |= set(names.tied)
    return tuple(sorted(chosen))


def is_named(name: str, pattern: str) -> bool:
    """Whether a pattern names a module: its full name or the end of it, `*` for anything."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _is_within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _shown(names: tuple[str, ...]) -> str:
    """The last parts of names, each once."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))
