"""The beginning of every verb, from the command line or from Python: a checked run, and a log that tells of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fourfold.base.log import get_logger, setup_logging
from fourfold.base.modelscope import fetch_model, tell_other_hubs, use_modelscope
from fourfold.config.load import Source, load
from fourfold.config.paths import MODEL, check_paths, named_models
from fourfold.config.rules import Verb
from fourfold.config.schema import Run

log = get_logger(__name__)


def begin(source: Source | None, overrides: Sequence[str] | Mapping[str, Any], verb: Verb) -> Run:
    """Load a config and check it for `verb`; set logging up and log what was mapped.

    Raises:
        ConfigError: with every problem of the keys, or of the local paths among them; or for what ModelScope's hub does
            not give, where it is in use.
    """
    run = load(source, overrides, verb=verb)
    check_paths(run, verb)
    begin_logging(run)
    for note in run.notes:
        log.info("%s", note)
    tell_other_hubs()
    if use_modelscope() and verb != "plan":  # which reads a config at most, and knows many by name
        run = _fetched(run, verb)
        check_paths(run, verb)
    return run


def _fetched(run: Run, verb: Verb) -> Run:
    """The run with the folders of what ModelScope's hub has in place of its names there."""
    model, weights = run.model, verb in ("train", "chat", "export")
    places: dict[str, Any] = {}
    for named in named_models(run, verb):
        revision = model.model_revision if named.key == MODEL else "main"
        options = {"cache_dir": model.cache_dir, "token": model.ms_hub_token, "weights": weights}
        found = tuple(fetch_model(name, named.key, revision=revision, **options) for name in named.names)
        places[named.key] = found[0] if named.is_single else found
    preference = {key: place for key, place in places.items() if key in type(run.preference).model_fields}
    return replace(
        run,
        model=model.model_copy(update={key: place for key, place in places.items() if key not in preference}),
        preference=run.preference.model_copy(update=preference),
    )


def begin_logging(run: Run) -> None:
    """Set logging up as `log_level` says."""
    level = run.output.log_level
    setup_logging(verbose=level in ("debug", "detail"))
    if level in ("warning", "error", "critical"):
        get_logger("fourfold").setLevel(level.upper())
