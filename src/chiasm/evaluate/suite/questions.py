"""The zero-shot question of a data set: its prompts, or a published protocol, asked of stored vectors.

In: a :class:`DataEntry` and the vectors of a model. Out: a function from image embeddings to
:class:`~chiasm.tasks.zero_shot.ZeroShotResult`. Every sentence is embedded once a model and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chiasm.errors import ConfigError, InputError
from chiasm.evaluate.suite.settings import DataEntry, expanded
from chiasm.evaluate.suite.vectors import ModelVectors, lookup
from chiasm.tasks.prompt_files import load_prompts, parse_prompts
from chiasm.tasks.prompts import PromptSet
from chiasm.tasks.zero_shot import ZeroShotResult, build_classifier, classify
from chiasm.types import Embeddings, digest_of

if TYPE_CHECKING:
    from chiasm.tasks.protocol import Protocol


@dataclass(frozen=True)
class SuiteQuestion:
    """What is asked of a data set.

    Attributes:
        prompts: One set of sentences a label, in the order of the data set's labels.
        mode: ``single`` or ``multi``.
        protocol: The published protocol, or None.
        variant: Of the protocol.
        made: The protocol's own form of the prompts.
    """

    prompts: PromptSet
    mode: Any
    protocol: Protocol | None = None
    variant: str = "published"
    made: Any = None


def read_question(entry: DataEntry) -> SuiteQuestion:
    """Return the prompts of a data set.

    Raises:
        ChiasmError: There are no labels, or the file of prompts lacks one.
    """
    if not entry.labels:
        raise InputError("the data set has no labels to ask for", hint="name `labels` and `truth`")
    mode = entry.resolved_mode
    path = None if entry.prompts is None else expanded(entry.prompts, "prompts")
    if entry.protocol is not None:
        return _by_protocol(entry, path, mode)
    if path is not None:
        prompts = load_prompts(path, templates=entry.template, pairs=mode == "multi")
    else:
        prompts = parse_prompts(list(entry.labels), templates=entry.template, pairs=mode == "multi")
    folded = {name.casefold(): name for name in prompts.names}
    names = [folded.get(label.casefold(), label) for label in entry.labels]
    return SuiteQuestion(prompts.select(names), mode)


def _by_protocol(entry: DataEntry, path: str | None, mode: str) -> SuiteQuestion:
    from chiasm.tasks.protocol import get_protocol
    from chiasm.tasks.protocol_prompts import make_prompts, read_prompt_file

    protocol = get_protocol(entry.protocol or "")
    protocol.variant(entry.variant)
    if protocol.top_j or protocol.local:
        raise ConfigError(f"protocol `{protocol.name}` needs more than one vector an image; a suite has one")
    if path is not None:
        made = read_prompt_file(protocol, path, variant=entry.variant, templates=entry.template, seed=0)
    else:
        made = make_prompts(protocol, list(entry.labels), variant=entry.variant, templates=entry.template, seed=0)
    if [n.casefold() for n in made.prompts.names] != [n.casefold() for n in entry.labels]:
        raise ConfigError(
            f"protocol `{protocol.name}` asks for other labels than the data set, or in another order",
            hint=f"its labels: {', '.join(made.prompts.names)}",
        )
    return SuiteQuestion(made.prompts, mode, protocol, entry.variant, made)


def question_digest(question: SuiteQuestion) -> str:
    """Return a digest that changes with any sentence, their order, the mode or the protocol."""
    name = None if question.protocol is None else question.protocol.name
    names = list(question.prompts.names)  # a table of sentences has no order of its own
    return digest_of([names, question.prompts.to_dict(), question.mode, name, question.variant], 24)


def ask(question: SuiteQuestion, vectors: ModelVectors) -> Callable[[Embeddings], ZeroShotResult]:
    """Return a function that classifies embeddings of a model; the sentences are embedded now, if they have to be."""
    protocol = question.protocol
    raw = protocol is not None and protocol.needs_raw_texts(question.variant)
    embed = lookup(vectors.sentences(question.prompts.texts(), normalize=not raw))
    if protocol is None:
        classifier = build_classifier(question.prompts, embed)
        return lambda images: classify(images, classifier, mode=question.mode)
    from chiasm.tasks.protocol_run import run_protocol

    return lambda images: run_protocol(
        protocol, images, embed, prompts=question.made, variant=question.variant, mode=question.mode
    )
