"""A network that all ranks have saved in pieces is one network again."""

import torch

from dinov3_hf.distributed.pieces import StateReader, on_host, state_file, write_pieces
from dinov3_hf.training.student import new_student
from dinov3_hf.training.whole_network import network_of_pieces, whole_network
from tests.training.test_distillation_trainer import STUDENTS, make_trainer, save_teacher


def test_pieces_of_two_ranks_make_the_network_again(tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    trainer = make_trainer(tmp_path / "run", teacher, students={"gated": STUDENTS["gated"]}, max_steps=1)
    trainer.train()
    (student,) = trainer.students
    halves = ([], [])
    for piece in on_host(student.pieces()):
        middle = len(piece.values) // 2
        halves[0].append(piece._replace(values=piece.values[:middle].clone()))
        halves[1].append(piece._replace(values=piece.values[middle:].clone(), start=piece.start + middle))
    for rank, pieces in enumerate(halves):
        write_pieces(state_file(tmp_path / "state", rank, 2), pieces)

    for name in ("ema", "student"):
        network = network_of_pieces(
            StateReader(tmp_path / "state").of("gated"),
            name,
            lambda name=name: new_student(student.args).get_submodule(name),
        )
        original = student.model.get_submodule(name)
        for key, tensor in original.state_dict().items():
            assert torch.equal(network.state_dict()[key], tensor), key
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        crops = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            expected = original.eval().backbone(crops).last_hidden_state
            assert torch.equal(network.backbone(crops).last_hidden_state, expected)


def test_what_is_whole_is_not_copied(tmp_path):
    trainer = make_trainer(tmp_path / "run", save_teacher(tmp_path / "teacher"), students={"vit": STUDENTS["vit"]})
    (student,) = trainer.students
    assert student.whole_ema() is student.model.ema
    assert whole_network(student.engine, student.model.student, None, is_main=False) is student.model.student
