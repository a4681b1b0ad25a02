"The shared start: whoever made it and whoever loads it train alike, to the last bit."
import torch
from penaltyanon.train import minimax, start
from penaltyanon.nets.anonymizers import UNet
from penaltyanon.core.machine import seed_everything
from penaltyanon.core.settings import resolve
from test_training import CPU, quiet, streams


def train(path, make: bool):
    "The weights after a short training that begins where the start was made, or from its file"
    s = resolve("smoke", precision="fp32", steps=3, identity_steps=8, warmup_steps=3, penalty="none")
    seed_everything(s.seed)
    p = minimax.make_networks(s, UNet((16,), 0.5), 3, CPU)
    if make:
        clips, views = streams()
        start.pretrain_identity(p.f_A, views, clips, quiet(s))
        start.warm_up(p, *streams(), quiet(s))
        start.save_start(path, p)
    start.load_start(path, p)
    seed_everything(s.seed)
    minimax.minimax(p, *streams(), quiet(s))
    return torch.cat([v.flatten().float() for net in (p.f_A, p.f_T, p.f_B) for v in net.state_dict().values()])


def test_the_maker_of_the_start_trains_no_other_way(tmp_path):
    "A gradient left over from identity pre-training once moved the first step: 10 points of cMAP 250 steps later."
    assert torch.equal(train(tmp_path/"start.safetensors", True), train(tmp_path/"start.safetensors", False))
