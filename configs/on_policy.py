"""Own texts: a student that is corrected on what it writes itself, against students that read what others wrote.

What     On the Bible in Basic English: a transformer teacher; a small student that learns from its scores on two per
         cent of the text; and that student trained on, for the same number of steps, in nine ways: on the text
         alone (control), by forward and by reverse KL on the text, on its own texts at half of the steps and at all of
         them, with a replay of them, with a teacher that takes a hand in writing, by the policy gradient of single
         tokens, and by that of whole texts.
Why      Agarwal et al. 2024 (GKD) and Gu et al. 2024 (MiniLLM): at inference a student goes on from its own tokens, and
         there the teacher's scores of the text say little. Reverse KL is the divergence whose expectation is over what
         the student writes.
Command  epigone run configs/on_policy.py
Cost     Measured: seven minutes on two cores (11 minutes of processor time), and 2.7 GiB.
Expect   Own texts lower the held-out perplexity by about one against the same divergence on the text, for the text is
         short. How probable the teacher finds a student's texts (`real_perplexity`) hangs on the divergence more than
         on whose texts it learned from. The policy gradient lags. docs/lessons.md has the figures.
"""

from dataclasses import replace as change

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.lessons.divergences import forward_kl, jsd, reverse_kl
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lessons.policy_gradient import sampled_reverse_kl, sequence_reverse_kl
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.config import DecoderConfig
from epigone.training.loop import Training
from epigone.training.on_policy import OnPolicy
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
WORDS = TrainedTokenizer(Words(lowercase=True), Text(BIBLE))

LARGE = DecoderConfig(layers=2, model_size=128, heads=4, max_length=128)
SMALL = DecoderConfig(layers=2, model_size=64, heads=4, max_length=128)

# Nothing of a verse is given: all of it is the student's own. What is given is never learned where share is 1.
OWN = OnPolicy(share=1.0, prompt_tokens=0, max_new=127)

WAYS: dict[str, tuple[Objective, OnPolicy | None]] = {
    "control": (TEXT_ALONE, None),
    "forward-text": (Objective(forward_kl), None),
    "reverse-text": (Objective(reverse_kl), None),
    "jsd-half-own": (Objective(jsd), change(OWN, share=0.5)),
    "reverse-own": (Objective(reverse_kl), OWN),
    "reverse-replay": (Objective(reverse_kl), change(OWN, replay=8, reuse=2)),
    "reverse-mixed": (Objective(reverse_kl), change(OWN, teacher_share=0.2, importance=True)),
    "policy-gradient": (Objective(sampled_reverse_kl), OWN),
    "whole-texts": (Objective(sequence_reverse_kl), OWN),
}
"""What each of the students is taught towards, and on whose texts."""


def lineage(seeds: int = 2, steps: int = 200, scale: float = 1.0) -> Lineage:
    """A teacher, a student that begins on text, and the same student trained on in every way.

    Args:
        seeds: repetitions of every recipe whose spread the report gives, at most 7.
        steps: training steps of each way.
        scale: factor on the training steps of the teacher and of the beginning; less is faster and worse.
    """

    def training(steps: float, rate: float, batch_size: int = 8) -> Training:
        optimizer = Optimizer(learning_rate=rate, warmup_steps=20)
        return Training(max(1, round(steps)), batch_size, sequence_length=128, optimizer=optimizer)

    alone = Lesson((Text(BIBLE),), objective=TEXT_ALONE, training=training(scale * 420, 4e-3))
    teacher = Node("teacher", 0, LARGE, WORDS, alone, labels={"family": "on-policy", "role": "teacher"})
    nodes = [teacher]
    for seed in range(seeds):
        crumbs = (Text(BIBLE, skip=20_000 * seed, tokens=20_000),)
        first = Lesson(crumbs, teacher=teacher.key, objective=Objective(), training=training(scale * 240, 3e-3))
        begin = Node("begin", 1, SMALL, WORDS, first, seed, labels={"family": "on-policy", "role": "start"})
        nodes.append(begin)
        for name, (objective, own) in WAYS.items():
            lesson = Lesson(
                crumbs,
                teacher=teacher.key if objective.needs_teacher else None,
                start_from=begin.key,
                objective=objective,
                training=training(steps, 1e-3),
                on_policy=own,
            )
            role = "student" if objective.needs_teacher else "control"
            nodes.append(Node(name, 2, SMALL, WORDS, lesson, seed, labels={"family": "on-policy", "role": role}))
    evaluation = Evaluation(
        text=Text(BIBLE, split="test"),
        real=Text(BIBLE),
        write_tokens=20_000,
        contexts=500,
        compare={"control": teacher.key},
    )
    return Lineage("on-policy", tuple(nodes), evaluation, __doc__.partition("\n")[0])
