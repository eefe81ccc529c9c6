"""Distillation: a student learns the full next-token distribution of a frozen teacher; no cross-entropy."""

from pathlib import Path

from nanotrain.checkpoint.hf_folder import load_config
from nanotrain.config.errors import UserError
from nanotrain.config.stage import DistillConfig
from nanotrain.data.blend_folder import check_caps
from nanotrain.data.loader import PretrainLoader
from nanotrain.data.manifest import check_sources
from nanotrain.data.prefetch import PrefetchingLoader
from nanotrain.engines import build_engine
from nanotrain.losses.distillation import ForwardKL
from nanotrain.model.hybrid import build_meta_model
from nanotrain.runtime.run import Run
from nanotrain.stages.training_products import (
    blend_shares,
    check_vocabulary,
    held_out_callback,
    save_trained,
    tokenizer_folder,
)
from nanotrain.training.loop import train
from nanotrain.training.teacher import TeacherLoader


def distill(config: DistillConfig, run: Run) -> Path:
    """Train the student of `init_from` towards the teacher of `teacher_from` and return its checkpoint folder.

    Args:
        config: temperature, curriculum, budget.
        run: inputs `init_from`, `teacher_from`, `data_from`.

    Raises:
        UserError: student and teacher do not share a vocabulary.
    """
    data, student_folder, teacher_folder = (run.inputs[key] for key in ("data_from", "init_from", "teacher_from"))
    student, teacher = load_config(student_folder), load_config(teacher_folder)
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"`stage.teacher_from` ({teacher_folder}) has a vocabulary of {teacher.vocab_size}, `stage.init_from`"
            f" ({student_folder}) one of {student.vocab_size}; logits can be distilled only between equal vocabularies."
        )
    check_vocabulary(student, data, "stage.init_from")
    check_sources(config.curriculum, data, "stage.curriculum")
    engine = build_engine(run.engine, build_meta_model(student), config.training)
    engine.load_hf(student_folder)
    teacher_engine = build_engine(run.engine, build_meta_model(teacher))
    teacher_engine.load_hf(teacher_folder)
    loader = PretrainLoader(
        data, config.curriculum, config.training, run.seed, dp_rank=engine.dp_rank, dp_size=engine.dp_size
    )
    check_caps(config.curriculum, loader.epochs(), "stage.curriculum")
    ahead = PrefetchingLoader(loader, config.training.steps)
    evaluate = held_out_callback(engine, data, config.training)
    with teacher_engine.head() as head:
        loss_fn = ForwardKL(head, config.temperature)
        summary = train(engine, TeacherLoader(ahead, teacher_engine), loss_fn, config.training, run, evaluate)
    return save_trained(
        engine,
        run,
        summary,
        config.training,
        tokenizer_from=tokenizer_folder(data),
        blend=blend_shares(loader.plan()),
        extra={"epochs": loader.epochs()},
    )
