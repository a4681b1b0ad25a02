"""Short trainings, by one process or by several that share each batch: what test_ranks.py compares.

    python rank_worker.py DEVICES OUT METHOD [METHOD-alone ...]

A training `METHOD-alone` is what would be wrong: negatives of the process's own images only."""
import sys
import torch
from penaltyanon.train import batches, minimax
from penaltyanon.train import ranks as ranks_module
from penaltyanon.nets.anonymizers import UNetPP, freeze_batchnorm
from penaltyanon.core.checkpoints import RunContext
from penaltyanon.core.machine import seed_everything
from penaltyanon.core.settings import resolve
from penaltyanon.train.methods import METHODS
from penaltyanon.train.ranks import ALONE, Ranks
from test_training import CPU, Data

devices, out, trainings = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
torch.set_num_threads(1)
if devices > 1:
    from lightning_fabric import Fabric
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp")
    fabric.launch()
    ranks = Ranks(fabric)
else: ranks = ALONE
everyone = ranks_module.Ranks.gather


class Labelled(Data):
    def __getitem__(self, i): return super().__getitem__(i) | dict(attributes=torch.tensor([float(i % 2), float(i % 3 == 0)]))


def train(name, gather):
    "The gradients of the first step, what the training logs, and its last weights of the penalty."
    ranks_module.Ranks.gather = everyone if gather else lambda self, z, views=2: z if views == 2 else everyone(self, z, views)
    s, method = resolve("smoke", method=name, backbone="unetpp", decoder=(16, 8, 8, 8), precision="fp32", lr_anonymizer=1e-3, clip_grad=0.0, steps=4, batch_clips=4, batch_images=8, ensemble=1, restart_every=0, privacy_updates=2), METHODS[name]
    seed_everything(0)
    p = minimax.make_networks(s, freeze_batchnorm(UNetPP(decoder=(16, 8, 8, 8))), 3, CPU, 2, method)
    p.ranks = ranks
    for net in (p.f_T, p.f_B): ranks_module.share_batchnorm(net, ranks)
    clips, images = batches.EndlessBatches(Labelled(8), 4, 0, ranks=ranks), batches.EndlessBatches(Labelled(16), 8, 1, ranks=ranks)
    grads, rows = {}, []
    for key, net, opt in (("f_A", p.f_A, p.opt_A), ("f_T", p.f_T, p.opt_T), ("f_B", p.f_B, p.opt_B)):
        def remember(opt, *_, key=key, net=net): grads.setdefault(key, torch.cat([q.grad.flatten().clone() for q in net.parameters() if q.grad is not None]))
        opt.register_step_pre_hook(remember)
    minimax.minimax(p, clips, images, RunContext(s, CPU, rows.append, progress=False), method)
    return dict(grads=grads, lam=(p.lam.value, p.lam.memory), rows=[{k: v for k, v in r.items() if k not in ("ms", "stage")} for r in rows])


trained = {name: train(name.removesuffix("-alone"), not name.endswith("-alone")) for name in trainings}
if ranks.is_first: torch.save(trained, out)
