"The shared start: whoever made it and whoever loads it play the same game, to the last bit."
import torch
from penaltyanon.train import batches, minimax, start
from penaltyanon.nets.anonymizers import UNet
from penaltyanon.core.machine import seed_everything
from penaltyanon.core.settings import resolve
from test_training import CPU, Data


def play(path, make: bool):
    "The weights after a short game that begins where the start was made, or from its file"
    s = resolve("smoke", precision="fp32", steps=3, identity_steps=8, warmup_steps=3, penalty="none")
    seed_everything(s.seed)
    p = minimax.make_networks(s, UNet((16,), 0.5), 3, CPU)
    streams = lambda: (batches.EndlessBatches(Data(6), 3, 0), batches.EndlessBatches(Data(8), 4, 0))
    if make:
        clips, views = streams()
        start.pretrain_identity(p.f_A, views, clips, s, CPU, progress=False)
        start.warm_up(p, *streams(), s, progress=False)
        start.save_start(path, p)
    start.load_start(path, p)
    seed_everything(s.seed)
    minimax.minimax(p, *streams(), s, progress=False)
    return torch.cat([v.flatten().float() for net in (p.f_A, p.f_T, p.f_B) for v in net.state_dict().values()])


def test_the_maker_of_the_start_has_no_other_game(tmp_path):
    "A gradient left over from identity pre-training once moved the first step: 10 points of cMAP 250 steps later."
    assert torch.equal(play(tmp_path/"start.safetensors", True), play(tmp_path/"start.safetensors", False))
