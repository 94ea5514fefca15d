"""Tasks of lm-evaluation-harness on a node: by their name, or from a task file."""

import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from epigone.errors import UserError, did_you_mean
from epigone.models.ngram import NGramModel
from epigone.opened import OpenedNode

RESAMPLES = 1000
"""For errors of figures that are no means. The harness' own 100,000 take minutes and tell the same."""

FEWSHOT_SEED = 1234
"""The harness' own choice of examples."""


def task_results(opened: OpenedNode, tasks: Sequence[str], *, seed: int = 0, chat: bool = False) -> dict[str, Any]:
    """What the harness finds: task -> {figure: value}, in the harness' own names.

    Args:
        opened: the node.
        tasks: names that the harness knows, or paths of task files (.yaml). Their data sets must be on this machine:
            nothing is loaded from the network unless HF_DATASETS_OFFLINE and HF_HUB_OFFLINE are set to 0.
        seed: of answers that a task wants sampled.
        chat: put prompts into the tokenizer's chat template.

    Raises:
        UserError: the package is missing, or a task is not known, cannot be read or asks what the node cannot do.
    """
    files = [_file(task) for task in tasks]
    manager = _manager(include_defaults=not all(files))
    for task, is_file in zip(tasks, files, strict=True):
        if not is_file and task not in manager.all_tasks:
            raise UserError(f"the harness has no task '{task}'{did_you_mean(task, manager.all_tasks)}")
    loaded = _loaded(manager, tasks)
    from lm_eval.evaluator import evaluate

    how: dict[str, Any] = {"bootstrap_iters": RESAMPLES, "log_samples": False}
    if chat:
        how |= {"apply_chat_template": True, "fewshot_as_multiturn": True}
    found = evaluate(lm=harness_model(opened, seed, chat), task_dict=loaded, **how)
    return {name: _figures(figures) for name, figures in found["results"].items()}


def _manager(include_defaults: bool) -> Any:
    """What knows the tasks. The environment is set first, since the packages read it when they are imported."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a fork would lock up with JAX's threads
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        missing = f"tasks need lm-evaluation-harness ('{error.name}' is missing): pip install .[harness]"
        raise UserError(missing) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=include_defaults)


def _loaded(manager: Any, tasks: Sequence[str]) -> Any:
    """The tasks with their data, set as `lm_eval.simple_evaluate` sets them."""
    try:
        loaded = manager.load(list(tasks))
    except Exception as error:  # of many types: task files and data sets are others' code
        cause = error.__cause__ or error
        said = str(cause).strip().split("\n")[0]
        reason = f"{type(cause).__name__}: {said}" if said not in ("", "None") else type(cause).__name__
        hint = "; HF_DATASETS_OFFLINE=0 HF_HUB_OFFLINE=0 lets it be loaded" if "ffline" in reason else ""
        raise UserError(f"the harness cannot load {', '.join(tasks)}: {reason}{hint}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def harness_model(opened: OpenedNode, seed: int = 0, chat: bool = False) -> Any:
    """The node as the harness takes it: a decoder is scored in one pass a batch, what counts is asked."""
    from epigone.evaluate.harness import HarnessModel

    model, tokenizer = opened.model, opened.tokenizer
    if isinstance(model, NGramModel):
        return HarnessModel(model, tokenizer, seed=seed, chat=chat)
    from epigone.sampling.decode import DecoderLanguageModel
    from epigone.sampling.greedy import continuation_scores

    assert isinstance(model, DecoderLanguageModel)
    score = partial(continuation_scores, model.config, model.sharding, model.params)
    return HarnessModel(model, tokenizer, score=score, max_length=model.config.max_length, seed=seed, chat=chat)


def _file(task: str) -> bool:
    """Whether a task is given as a file. Raises UserError if that is not there."""
    is_file = task.endswith((".yaml", ".yml")) or "/" in task
    if is_file and not Path(task).is_file():
        raise UserError(f"there is no task file '{task}'")
    return is_file


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """The numbers of a task, 'none' left out where no filter was at work: acc, acc_stderr, exact_match,strict, ..."""
    names = {name: name.removesuffix(",none") for name, value in found.items() if isinstance(value, int | float)}
    return {short: float(found[name]) for name, short in names.items()}
