"""The options of CLIP-IT's published training script, as a table: what each means here and where that differs.

Comes in: words of a command line (``--ds pcam --model UNI --lora_r 16``), with hyphens or underscores. Goes out: a
`DistillRecipe`. The table is also the source of ``docs/reference/clip-it-options.md``. Defaults are the reference's,
except that the text tower is not adapted (``--lora-text 0``): its targets would be trained to be easy.

References: BanafshehKarimian/ModalityPairing at commit 4f2bed7, ``train_with_fuser_.py``, read, not copied; its README
calls the script ``train_fuser_.py``.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from chiasm.datasets.named import dataset_facts
from chiasm.distill.recipe import (
    BackboneConfig,
    DistillData,
    DistillRecipe,
    DistillRun,
    FuseConfig,
    HeadOptions,
    Monitor,
    PairingConfig,
    StageConfig,
)
from chiasm.encoders.base import LoraConfig
from chiasm.errors import ConfigError, UnknownName

Origin = Literal["reference", "later", "ours"]


@dataclass(frozen=True)
class ReferenceOption:
    """One option.

    Attributes:
        name: Without hyphens, words joined by underscores: ``lora_r``.
        kind: Turns a word into a value; ``bool`` marks a switch without a value.
        default: Here.
        field: Of the recipe that it sets; "" for none.
        here: What it means here.
        differs: Where the reference does something else; "" where it does the same.
        choices: Values that it may have; empty for any.
        origin: ``reference``: the published commit; ``later``: other commits of the same repository; ``ours``.
    """

    name: str
    kind: Callable[[str], object]
    default: object
    field: str
    here: str
    differs: str = ""
    choices: tuple[object, ...] = ()
    origin: Origin = "reference"

    @property
    def flag(self) -> str:
        """The option as it is written: ``--lora-r``."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value."""
        return self.kind is bool


#: The reference's keys of backbones -> names of the catalog.
MODELS: Mapping[str, str] = {
    "UNI": "uni",
    "DINOL14": "kaiko-vitl14",
    "VITS_8": "kaiko-vits8",
    "VITS_16": "kaiko-vits16",
    "VITB_8": "kaiko-vitb8",
    "VITB_16": "kaiko-vitb16",
}
DATASETS = ("pcam", "bach", "crc")
#: Its monitors -> ours. Its accuracy is plain for two classes and the mean over classes beyond.
MONITORS: Mapping[str, Monitor] = {
    "val_loss": "val_loss",
    "val_acc": "val_accuracy",
    "val_auroc": "val_auroc",
    "val_ce": "val_ce",
    "val_accuracy": "val_accuracy",
    "val_balanced_accuracy": "val_balanced_accuracy",
}
#: The patch embedding in native and in transformers' towers: all that ``--no-lin`` leaves of a ViT to adapt.
NO_LIN_TARGETS = ("conv1", "projection")
#: Epochs of the text stage in ``finetune_text.py`` of other commits.
TEXT_EPOCHS = {"pcam": 5.0, "bach": 100.0, "crc": 10.0}
#: kaiko's eva, which made the reference's unimodal probes: batch, learning rate, steps an epoch, patience in epochs.
PROBES = {"pcam": (4096, 0.01, 64, 9), "bach": (256, 0.000625, 1, 400), "crc": (4096, 0.01, 20, 24)}
PROBE_STEPS = 12_500

_O = ReferenceOption
OPTIONS = (
    _O("ds", str, "pcam", "data.source", "Data set: its classes, its splits, the tissue of its reports.",
       "The folder was fixed in its code; here `--root` says where the data lie.", choices=DATASETS),
    _O("model", str, "UNI", "backbone.encoder",
       f"Backbone: {', '.join(f'{k} (`{v}`)' for k, v in MODELS.items())}, any name of `chiasm models`, or a folder.",
       "It needed a probe's checkpoint besides; here the unimodal stage trains the probe. Its PCam images were normalised "
       "alike for all backbones; here each backbone has its own normalisation."),
    _O("run", str, "run1", "name", "Becomes part of the run's name.",
       "It replaced `run1` in the path of the probe's checkpoint. Here the probe's seed is `--sd`."),
    _O("dir", str, "output", "run.out", "Folder of the run, first part."),
    _O("output", str, "train_with_text", "run.out", "Folder of the run, second part: everything lies in `DIR/OUTPUT`.",
       "It wrote `predictions.csv` and TensorBoard files there."),
    _O("batch", int, 64, "fuse.batch_size", "Images per step of the fuse stage."),
    _O("lr", float, 1e-3, "fuse.lr", "Learning rate of Adam in the fuse stage."),
    _O("ep", float, 1.0, "fuse.epochs", "Passes of the fuse stage over the training images."),
    _O("worker", int, 8, "run.workers", "Threads that prepare images.", "Processes there."),
    _O("val_int", float, 0.1, "data.validation",
       "Share of the training images to hold out for validation, by group, class and seed. It counts for BACH: PCam has "
       "an official split `val`, CRC gets the fifth that the reference holds out.",
       "Its README says the same, its code does not: there it is the interval between validations, as a share of an "
       "epoch (here `--val-every`), and BACH is validated on every 20th training image, 14 in all."),
    _O("clip", float, 0.5, "fuse.clip_norm", "Upper bound of the gradient's norm; 0: none."),
    _O("weight_decay", float, 1e-4, "fuse.weight_decay", "L2, added to the gradient before Adam."),
    _O("scheduler", int, 0, "fuse.schedule", "1: the rate falls to 0 along a cosine over the stage; 0: it stays.",
       "Its cosine is as long as 12,500 epochs, so it never falls.", choices=(0, 1)),
    _O("lora_r", int, 16, "backbone.lora.rank", "Rank of the adapters."),
    _O("lora_alpha", float, 8.0, "backbone.lora.alpha", "The update is multiplied by alpha / rank.",
       "The example of its README has 4, so the scale of the published runs is not certain."),
    _O("lora_dropout", float, 0.0, "backbone.lora.dropout", "On the input of the adapters."),
    _O("lora_text", int, 0, "fuse.text_lora",
       "1: adapt the text tower, too. Its classification loss then anchors the targets, and a collapse stops the run.",
       "1 there, without an anchor: the target learns to be predictable, and one constant for all texts is the best "
       "target. Its adapters on the attention's output never got a gradient.", choices=(0, 1)),
    _O("lora_vision", int, 1, "backbone.lora", "1: adapt the backbone in the fuse stage; 0: its features stay as they are.",
       "It adapted the unimodal head `h_v` in the same way and locked it; here `h_v` goes on training.",
       choices=(0, 1)),
    _O("no_lin", bool, False, "backbone.lora.targets", "Adapt the patch embedding only, no linear layer."),
    _O("monitor", str, "val_loss", "fuse.monitor",
       "With `--chkpnt` or `--early`: what decides which weights are kept: "
       f"{', '.join(f'`{m}`' for m in MONITORS)}.",
       "`val_loss` includes the distillation term there; here, too, so prefer `val_ce`.", choices=tuple(MONITORS)),
    _O("mod", str, "min", "", "Must fit the monitor: `min` for losses, `max` for the rest.",
       "Independent of the monitor, so a wrong pair kept the worst weights.", choices=("min", "max")),
    _O("patience", int, 5, "fuse.patience", "With `--early`: stop after so many validations without a better value."),
    _O("delta", float, 5.0, "fuse.min_delta", "With `--early`: by how much a value must be better to count.",
       "The same 5, with which no loss or accuracy is ever better, so the run stops at once: set it to 0."),
    _O("early", bool, False, "fuse.patience", "Stop early by the monitor, on held-out images.",
       "By the loss on training images, whatever the monitor."),
    _O("log", int, 1, "", "Accepted, without effect: every validation is logged.",
       "Steps between log lines; its README says epochs."),
    _O("wandb", bool, False, "run.log", "Send the numbers to Weights & Biases, too."),
    _O("chkpnt", bool, False, "fuse.monitor", "Keep the best weights by the monitor; without it the last ones."),
    _O("learner", str, "late_fusion_kd", "fuse.kd_weight", "`late_fusion` sets λ to 0; `late_fusion_kd` distils.",
       "Both train the same model, with distillation.", choices=("late_fusion", "late_fusion_kd")),
    _O("kd_layers", int, 1, "heads.distill", "1: `h_d` is linear; more: it has a hidden layer.",
       "Read but never used at the published commit."),
    _O("sd", int, 0, "seed", "Seed of everything that is drawn."),
    _O("lam", float, 1.0, "fuse.kd_weight", "λ, the weight of the distillation term.",
       "Fixed to 1 at the published commit.", origin="later"),
    _O("val_every", int, 0, "fuse.eval_every", "Steps between validations; 0: ten of them an epoch.",
       "There `--val-int`, default a tenth of an epoch.", origin="ours"),
    _O("ref_compat", bool, False, "run.ref_compat",
       "As the published code computes: cross-entropy of the softmax output, `h_t` drawn at random, its input and the "
       "features left as they are. Only to compare with it.", origin="ours"),
    _O("root", str, "", "data.source", "Folder of the data set; default `${CHIASM_DATA}/DS`: `pcam`, `bach`, `crc`.", origin="ours"),
    _O("reports", str, "", "pairing.reports", "Corpus of reports, filtered by the tissue of the data set; default `${CHIASM_REPORTS}`.",
       "`text/text_breast.txt` or `text/text_colo.txt`, and pairs in files that are not published.", origin="ours"),
    _O("pairs", str, "", "pairing.pairs", "Folder made by `chiasm pairing`, in place of `--reports`.", origin="ours"),
    _O("encoder", str, "conch", "pairing.encoder", "The CLIP that pairs and whose text side is the target.",
       origin="ours"),
    _O("device", str, "cpu", "run.device", "`cpu`, `cuda` ...", "The first GPU.", origin="ours"),
)  # fmt: skip
BY_NAME = {option.name: option for option in OPTIONS}


def parse_reference(words: Sequence[str]) -> dict[str, Any]:
    """Return the options on a command line, by name; only those that were given.

    Args:
        words: As in ``sys.argv[1:]``; ``--lora-r 16`` and ``--lora_r 16`` are the same.

    Raises:
        ConfigError: An unknown option (with the nearest one), a missing value, one of the wrong type or choice.
    """
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option in OPTIONS:
        spellings = dict.fromkeys((option.flag, f"--{option.name}"))
        if option.is_switch:
            parser.add_argument(*spellings, dest=option.name, action="store_true")
        else:
            parser.add_argument(*spellings, dest=option.name, type=str)
    given, unknown = parser.parse_known_args(list(words))
    if unknown:
        known = [option.flag for option in OPTIONS]
        near = difflib.get_close_matches(unknown[0].replace("_", "-"), known, n=1, cutoff=0.6)
        meant = f"; did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"`{unknown[0]}` is no option of the reference{meant}", hint=f"known: {', '.join(known)}")
    return {name: _value(BY_NAME[name], value) for name, value in vars(given).items()}


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print before it ends the program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.replace("argument ", "option "), hint="docs/reference/clip-it-options.md lists them")


def _value(option: ReferenceOption, given: object) -> object:
    """Return a value of the option's kind.

    Raises:
        ConfigError: It is of another kind, or none of the choices.
    """
    value = given
    if option.is_switch:
        if not isinstance(given, bool):
            raise ConfigError(f"`{option.flag}` is a switch, got `{given}`")
        return given
    try:
        if isinstance(given, bool):
            raise ValueError
        value = option.kind(str(given))
    except ValueError:
        kind = {int: "a whole number", float: "a number"}.get(cast(type, option.kind), "a word")
        raise ConfigError(f"`{option.flag}` must be {kind}, got `{given}`") from None
    if option.choices and value not in option.choices:
        known = [str(choice) for choice in option.choices]
        raise UnknownName(f"value of `{option.flag}`", str(value), known, hint=f"one of: {', '.join(known)}")
    return value


def recipe_from_reference(options: Mapping[str, object]) -> DistillRecipe:
    """Return the recipe of a run that the reference's options describe.

    Stages that its training script takes for granted follow what made its checkpoints: the unimodal probe is eva's
    (SGD, 12,500 steps), the text stage that of ``finetune_text.py``.

    Args:
        options: Name (with hyphens or underscores, with or without leading hyphens) -> value; others keep their
            defaults. See :data:`OPTIONS`.

    Raises:
        ConfigError: An unknown option, a value of the wrong type, or two options that contradict each other.
        UnknownName: A value that is not among its choices, or an unknown backbone.
    """
    o: dict[str, Any] = {option.name: option.default for option in OPTIONS}
    for key, value in options.items():
        name = key.lstrip("-").replace("-", "_")
        if name not in BY_NAME:
            near = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.6)
            meant = f"; did you mean `{BY_NAME[near[0]].flag}`?" if near else ""
            raise ConfigError(f"`{key}` is no option of the reference{meant}")
        o[name] = _value(BY_NAME[name], value)
    facts = dataset_facts(o["ds"])
    if o["pairs"] and o["reports"]:
        raise ConfigError("`--pairs` and `--reports` exclude each other", hint="pairs were made from a corpus already")
    lora = LoraConfig(rank=o["lora_r"], alpha=o["lora_alpha"], dropout=o["lora_dropout"])
    seen = replace(lora, targets=NO_LIN_TARGETS) if o["no_lin"] else lora
    heads = HeadOptions(distill="linear" if o["kd_layers"] == 1 else "mlp")
    if o["ref_compat"]:
        heads = replace(heads, raw_text=True, standardize=False)
    return DistillRecipe(
        name="_".join(part for part in ("clip_it", facts.name, _word(o["model"]), _word(o["run"])) if part),
        seed=o["sd"],
        data=DistillData(
            source=f"{facts.name}:{o['root'] or '${CHIASM_DATA}/' + facts.name}",
            validation=o["val_int"],
        ),
        pairing=PairingConfig(
            pairs=o["pairs"] or None,
            reports=None if o["pairs"] else o["reports"] or "${CHIASM_REPORTS}",
            encoder=o["encoder"],
            tissue=None if o["pairs"] else facts.tissue,
        ),
        backbone=BackboneConfig(encoder=backbone_of(o["model"]), lora=seen if o["lora_vision"] else None),
        heads=heads,
        unimodal=_probe(o["ds"]),
        text=StageConfig(
            epochs=TEXT_EPOCHS[o["ds"]], batch_size=64, lr=1e-3, weight_decay=1e-4, schedule="constant",
            monitor="val_accuracy",
        ),
        fuse=_fuse(o, lora),
        run=DistillRun(
            out=f"{o['dir']}/{o['output']}",
            device=o["device"],
            workers=o["worker"],
            batch_size=o["batch"],
            log=("wandb",) if o["wandb"] else (),
            ref_compat=o["ref_compat"],
        ),
    )  # fmt: skip


def backbone_of(model: str) -> str:
    """Return the name that ``chiasm.load`` knows for one of the reference's, of the catalog's, or for a path.

    Raises:
        UnknownName: None of these.
    """
    if model in MODELS:
        return MODELS[model]
    from chiasm.encoders.catalog import CATALOG

    if CATALOG.find(model) is not None or "$" in model or Path(model).expanduser().exists():
        return model
    known = ", ".join(MODELS)
    raise UnknownName("backbone", model, [*MODELS, *CATALOG.names()], hint=f"{known}, or a name of `chiasm models`")


def notes_on(options: Mapping[str, object]) -> tuple[str, ...]:
    """Return what a user of these options should know before the run: traps that the reference's defaults set."""
    o = {key.lstrip("-").replace("-", "_"): value for key, value in options.items()}

    def at(name: str) -> Any:
        return o.get(name, BY_NAME[name].default)

    notes = []
    if at("early") and float(at("delta")) >= 1:
        checks = int(at("patience")) + 1
        notes.append(
            f"--early with --delta {at('delta'):g} stops after {checks} validations, whatever they say; use --delta 0"
        )
    if at("ref_compat"):
        notes.append("--ref-compat trains on the softmax of the softmax, as the published code: for comparison only")
    if at("learner") == "late_fusion":
        notes.append("--learner late_fusion means no distillation here; in the reference it distils all the same")
    if "val_int" in o and at("ds") != "bach":
        notes.append(f"--val-int has no effect on {at('ds')}, which brings a validation split")
    return tuple(notes)


def _probe(ds: str) -> StageConfig:
    batch, lr, epoch, patience = PROBES[ds]
    return StageConfig(
        steps=PROBE_STEPS, batch_size=batch, lr=lr, weight_decay=0.0, optimizer="sgd", schedule="cosine",
        monitor="val_accuracy", eval_every=epoch, patience=patience,
    )  # fmt: skip


def _fuse(o: Mapping[str, Any], lora: LoraConfig) -> FuseConfig:
    monitor = MONITORS[o["monitor"]]
    wanted = "min" if monitor in ("val_loss", "val_ce") else "max"
    if o["mod"] != wanted:
        raise ConfigError(f"`--monitor {o['monitor']}` is better when it is {wanted}, `--mod` says {o['mod']}")
    return FuseConfig(
        epochs=o["ep"], batch_size=o["batch"], lr=o["lr"], weight_decay=o["weight_decay"],
        schedule="cosine" if o["scheduler"] else "constant", clip_norm=o["clip"] or None,
        monitor=monitor if o["chkpnt"] or o["early"] else "none", eval_every=o["val_every"],
        patience=o["patience"] if o["early"] else 0, min_delta=o["delta"] if o["early"] else 0.0,
        kd_weight=0.0 if o["learner"] == "late_fusion" else o["lam"], warm_start_text=not o["ref_compat"],
        text_lora=lora if o["lora_text"] else None,
    )  # fmt: skip


def _word(text: str) -> str:
    """Return a word for a name: the last part of a path, in letters, digits and ``_``."""
    return "".join(c if c.isalnum() else "_" for c in Path(text).name).strip("_").lower()


def options_page() -> str:
    """Return ``docs/reference/clip-it-options.md``."""
    origins: Mapping[Origin, str] = {"reference": "", "later": " (other commits)", "ours": " (ours)"}
    lines = [
        "# The options of CLIP-IT's script, here",
        "",
        "Written by `tools/make_clip_it_pages.py` from the table in `src/chiasm/distill/reference.py`; do not edit.",
        "",
        "`chiasm distill --ds pcam --model UNI ...` and `python examples/train_fuser_.py --ds pcam --model UNI ...` take the",
        "options of the published script (BanafshehKarimian/ModalityPairing, commit 4f2bed7), written with hyphens or with",
        "underscores: `--lora-r` and `--lora_r`. Each sets a field of a recipe (`chiasm distill RECIPE.toml`), which is the",
        "fuller way to say the same. Defaults are the script's, except `--lora-text`.",
        "",
        "| option | default | field | what it means here | where the reference differs |",
        "|---|---|---|---|---|",
    ]
    for option in OPTIONS:
        default = "off" if option.is_switch else f"`{option.default:g}`" if isinstance(option.default, float) else ""
        default = default or (f"`{option.default}`" if option.default != "" else "–")
        cells = [f"`{option.flag}`{origins[option.origin]}", default, f"`{option.field}`" if option.field else "–",
                 option.here, option.differs or "–"]  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "Stages that the published script takes for granted, because it loads their checkpoints:",
        "",
        "| stage | data set | here |",
        "|---|---|---|",
    ]
    for ds in DATASETS:
        batch, lr, _, patience = PROBES[ds]
        lines.append(
            f"| unimodal probe | {ds} | SGD (momentum 0.9), learning rate {lr:g}, batch {batch:,}, {PROBE_STEPS:,} steps, "
            f"cosine, no weight decay, patience {patience} epochs: the protocol of kaiko's eva |"
        )
    for ds in DATASETS:
        lines.append(
            f"| text head | {ds} | Adam, learning rate 0.001, batch 64, {TEXT_EPOCHS[ds]:g} epochs: as `finetune_text.py` of "
            "other commits |"
        )
    return "\n".join(lines) + "\n"
