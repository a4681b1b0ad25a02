"Avatars: taint, poisoning, leaks on puppets with the truth, the map, sound and times, the command with a finder that knows."
import json
from dataclasses import replace
from fractions import Fraction
import numpy as np, pytest
cv2 = pytest.importorskip("cv2")
import torch
from PIL import ImageDraw
from penaltyanon.avatar.compose import DRAWN, FILLED, FILMED, Replacement, read_provenance
from penaltyanon.avatar.finding import close_time
from penaltyanon.avatar.people import FramePeople, Person, place_body, stand_body
from penaltyanon.avatar.windows import PeopleReplacer
from penaltyanon.core.files import UsageError
from penaltyanon.data.puppets import ACTIONS, SUPERSAMPLING, draw_scene, paint_puppet, place_joints, pose_at, skeleton
from penaltyanon.data.video import write_video
from penaltyanon.edge import command
from penaltyanon.edge.anonymize import Options, anonymize_file
from penaltyanon.edge.streams import decode_frames

JOINTS = {11: "shoulder_b", 12: "shoulder_a", 13: "elbow_b", 14: "elbow_a", 15: "hand_b", 16: "hand_a",
          23: "hip_b", 24: "hip_a", 25: "knee_b", 26: "knee_a", 27: "foot_b", 28: "foot_a"}       # seen from the front
ENDS = {17: 15, 19: 15, 21: 15, 18: 16, 20: 16, 22: 16, 29: 27, 31: 27, 30: 28, 32: 28}       # hands and feet


def puppet_person(mask, joints):
    "A puppet's joints as the points of a body; a puppet is flat, so its depth is zero."
    world, pixels = stand_body(), np.ones((33, 4), np.float32)
    hips, scale = (joints["hip_a"] + joints["hip_b"]) / 2, np.linalg.norm(joints["head"] - joints["hip"]) / .65
    for k, name in JOINTS.items(): world[k] = *((joints[name] - hips) / scale), 0
    for k, base in ENDS.items(): world[k] = world[base] + np.float32([0, .06, -.02])
    pixels[:, :2] = world[:, :2] * scale + hips
    return Person(0, pixels, world, 1., mask)


def puppet_clip(seed, n=32, size=128):
    "Frames of a puppet, what is true of them, and the background without it."
    scene = draw_scene(np.random.default_rng(seed), ACTIONS[seed % len(ACTIONS)], (1, 0, 1, 1, 0), size)     # one person
    background, frames, found = np.asarray(scene.backdrop.reduce(SUPERSAMPLING)), [], []
    for t in range(n):
        picture, pose = scene.backdrop.copy(), pose_at(scene.script, t)
        paint_puppet(ImageDraw.Draw(picture), pose, scene.camera, scene.style)
        frames.append(np.asarray(picture.reduce(SUPERSAMPLING)))
        mask = (frames[-1] != background).any(-1)
        joints = {k: np.asarray(v) / SUPERSAMPLING for k, v in place_joints(skeleton(pose), scene.camera).items()}
        found.append(FramePeople([puppet_person(mask, joints)], cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))) > 0))
    return np.stack(frames), found, background


@pytest.fixture(scope="module", params=[0, 5])
def puppet(request): return puppet_clip(request.param)


def replaced(frames, found, how=Replacement()):
    "A clip of one window, and what is known of it."
    def find(window):
        assert len(window) == len(found), "a cut where there is none"
        return found
    return list(PeopleReplacer(find, how)(frames))


def psnr(a, b): return 10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9))


@pytest.mark.parametrize("draw", ["avatar", "removed"])
def test_no_pixel_of_a_puppet_is_left(puppet, draw):
    frames, found, background = puppet
    for frame, known, made in zip(frames, found, replaced(frames, found, Replacement(command.AVATARS[draw]))):
        mask = known.people[0].mask
        assert not ((made.rgb == frame).all(-1) & mask & (frame != background).any(-1)).sum()
        assert not (made.provenance == FILMED)[mask].any()


def test_what_is_behind_a_puppet_is_its_background(puppet):
    frames, found, background = puppet
    made = replaced(frames, found, Replacement(draw=None))
    hidden = np.stack([f.hidden for f in found])
    always = hidden.all(0)      # never seen: invented
    apart = [psnr(m.rgb[f.hidden & ~always], background[f.hidden & ~always]) for m, f in zip(made, found)]
    assert np.median(apart) > 30, apart
    assert psnr(np.stack([m.rgb for m in made]), np.stack([background] * len(made))) > 22


def test_an_avatar_stands_where_the_puppet_stood(puppet):
    frames, found, _ = puppet
    for made, known in zip(replaced(frames, found), found):
        drawn, mask = made.provenance == DRAWN, known.people[0].mask
        assert (drawn & cv2.dilate(mask.astype(np.uint8), np.ones((15, 15))).astype(bool)).sum() > .7 * drawn.sum() > 100


@pytest.mark.parametrize("paint", ["noise", "black", "swapped"])
def test_a_persons_pixels_change_nothing(puppet, paint):
    "Whatever a person looks like: the same FramePeople, the same output."
    frames, found, _ = puppet
    others = {"noise": np.random.default_rng(1).integers(0, 256, frames.shape, dtype=np.uint8), "black": frames * 0, "swapped": frames[..., [2, 0, 1]]}
    tainted = np.where(np.stack([f.people[0].mask for f in found])[..., None], others[paint], frames)
    for one, other in zip(replaced(frames, found), replaced(tainted, found)):
        assert np.array_equal(one.rgb, other.rgb) and np.array_equal(one.provenance, other.provenance)


def test_the_one_exception_is_a_person_in_the_colours_of_the_wall(puppet):
    "Then the guard against people who were missed takes the wall for a person: it is invented, and it is not the person that is shown."
    frames, found, background = puppet
    masks = np.stack([f.people[0].mask for f in found])[..., None]
    plain, near = replaced(frames, found, Replacement(draw=None)), np.any([f.hidden for f in found], axis=0)
    far = cv2.dilate(near.astype(np.uint8), np.ones((9, 9))) == 0
    alike = replaced(np.where(masks, background, frames), found, Replacement(draw=None))
    assert alike[0].invented >= plain[0].invented
    for one, other in zip(plain, alike): assert np.array_equal(one.rgb[far], other.rgb[far])


MISSED = {"every second": slice(0, None, 2), "the first half": slice(0, 30), "the middle": slice(15, 45), "the last half": slice(30, None)}
RED = np.uint8([250, 10, 10])


def red_clip(n=60, sway=0., size=(96, 128)):
    "Somebody in plain red before a wall, and what is true."
    wall = np.random.default_rng(0).integers(60, 190, (12, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    persons = [place_body((60 + sway * np.sin(t / 3), 48), 70, size) for t in range(n)]
    frames = np.stack([np.where(p.mask[..., None], RED, wall) for p in persons])
    return frames, [FramePeople([p], cv2.dilate(p.mask.astype(np.uint8), np.ones((9, 9))) > 0) for p in persons]


def red_pixels(rgb): return int((rgb == RED).all(-1).sum())


@pytest.mark.parametrize("missed", MISSED)
def test_who_stands_and_is_missed_in_half_of_the_frames_is_in_none(missed):
    "No mask at all in those frames, and no closing over time either."
    frames, found = red_clip()
    for i in range(60)[MISSED[missed]]: found[i] = FramePeople([], np.zeros(frames.shape[1:3], bool))
    assert not sum(red_pixels(m.rgb) for m in replaced(frames, found, Replacement(draw=None)))


def test_who_sways_and_is_missed_in_every_second_frame_is_in_none():
    "The finder closes masks over time; what it leaves open is never the person."
    frames, found = red_clip(sway=2)
    for i in range(0, 60, 2): found[i] = FramePeople([], np.zeros(frames.shape[1:3], bool))
    closed = close_time(np.stack([f.hidden for f in found]), 12)
    found = [replace(f, hidden=h) for f, h in zip(found, closed)]
    assert not sum(red_pixels(m.rgb) for m in replaced(frames, found, Replacement(draw=None)))


# ---- the command
@pytest.fixture(scope="module")
def film(tmp_path_factory):
    frames, found = red_clip(40, sway=20)
    path = tmp_path_factory.mktemp("avatars")/"film.mkv"
    write_video(path, torch.from_numpy(frames).permute(0, 3, 1, 2), fps=10)
    return path, found


def model(found, name="avatar"): return command.make_replacer(name, lambda is_live: lambda frames: found[:len(frames)], {"name": "truth"})


def reddish(rgb): return int(((rgb[..., 0] > 215) & (rgb[..., 1] < 45) & (rgb[..., 2] < 45)).sum())


@pytest.mark.parametrize("name", ["avatar", "removed"])
def test_the_command_replaces_people_and_keeps_the_times(film, name, tmp_path):
    path, found = film
    outcome = command.anonymize(path, tmp_path/"out.mp4", model(found, name), preview_to=tmp_path/"four.png")
    entry, shown = outcome["files"][0], list(decode_frames(tmp_path/"out.mp4"))
    assert outcome["ok"] and entry["frames_out"] == len(shown) == 40 and entry["people"]["tracks"] == (name == "avatar")
    assert [f.pts * f.info.time_base for f in shown] == [Fraction(t, 10) for t in range(40)]
    assert not sum(reddish(f.rgb) for f in shown)
    maps = read_provenance(tmp_path/"out.mp4.provenance.mkv")
    assert [set(np.unique(m)) for m in maps] == [{FILMED, FILLED, DRAWN} if name == "avatar" else {FILMED, FILLED}] * 40
    manifest = json.loads((tmp_path/"out.mp4.avatar.json").read_text())
    assert manifest["people"] == {"name": "truth"} and manifest["summary"]["frames"] == 40 and manifest["map"] == "out.mp4.provenance.mkv"
    assert (tmp_path/"four.png").is_file()


def test_frames_that_are_refused_are_black_and_in_the_report(film, tmp_path):
    path, found = film
    found = [replace(f, refused="two people in one" if i in (3, 4) else "") for i, f in enumerate(found)]
    entry = anonymize_file(path, tmp_path/"out.mkv", model(found))
    assert (entry["status"], entry["blank"], entry["people"]["refused"]) == ("done", 2, 2) and "two people in one" in str(entry["errors"])
    shown = [f.rgb for f in decode_frames(tmp_path/"out.mkv")]
    assert len(shown) == 40 and max(shown[3].max(), shown[4].max()) < 8 < shown[5].max()
    assert (read_provenance(tmp_path/"out.mkv.provenance.mkv")[3:5] == FILLED).all()
    dropped = anonymize_file(path, tmp_path/"dropped.mkv", model(found), Options(on_bad_frame="drop"))
    assert dropped["frames_out"] == len(read_provenance(tmp_path/"dropped.mkv.provenance.mkv")) == 38


def test_a_film_that_cannot_be_trusted_is_not_written(film, tmp_path):
    path, found = film
    entry = anonymize_file(path, tmp_path/"out.mp4", model([replace(f, refused="too many people") for f in found]))
    assert entry["status"] == "failed" and "too many people" in entry["reason"] and not list(tmp_path.iterdir())
    def breaks(frames): raise RuntimeError("no detector")
    entry = anonymize_file(path, tmp_path/"out.mp4", command.make_replacer("avatar", lambda is_live: breaks, {}))
    assert entry["status"] == "failed" and "no detector" in entry["reason"] and not list(tmp_path.iterdir())


def test_the_rest_of_the_frame_may_get_its_own(film, tmp_path):
    path, found = film
    outcome = command.anonymize(path, tmp_path/"out.mkv", model(found, "removed"), Options(background="generated"))
    assert outcome["ok"] and (read_provenance(tmp_path/"out.mkv.provenance.mkv") == FILLED).all()
    first, *others = [f.rgb.astype(int) for f in decode_frames(tmp_path/"out.mkv")]
    assert max(np.abs(o - first).max() for o in others) < 16       # a stage that knows nothing of the film
    with pytest.raises(UsageError, match="say blur-weak@people"): command.anonymize(path, tmp_path/"no.mkv", "blur-weak", Options(background="blur"))
    with pytest.raises(UsageError, match="use keep, blur"): command.anonymize(path, tmp_path/"no.mkv", model(found), Options(background="sky"))


def test_a_photograph_is_a_window_of_one(film, tmp_path):
    from PIL import Image
    frames, found = red_clip(1)
    Image.fromarray(frames[0]).save(tmp_path/"in.png")
    entry = anonymize_file(tmp_path/"in.png", tmp_path/"out.png", model(found))
    assert entry["status"] == "done" and not red_pixels(np.asarray(Image.open(tmp_path/"out.png")))
