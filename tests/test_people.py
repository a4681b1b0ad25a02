"Who is where: two engines that agree, tracks, what is hidden, what is refused; by scripted detectors, and by the real networks where they are."
from importlib.util import find_spec
import numpy as np, pytest
from conftest import SHARED, python
from penaltyanon.avatar.blazepose import BlazePose
from penaltyanon.nets.catalog import find_kept

WEIGHTS = find_kept("blazepose")        # of the user who runs the tests, not of the tests' own empty cache
needs_weights = pytest.mark.skipif(not WEIGHTS, reason="no weights here: penaltyanon weights fetch blazepose")
needs_litert = pytest.mark.skipif(not find_spec("ai_edge_litert"), reason="ai-edge-litert is not installed: pip install 'penaltyanon[avatar]'")
needs_clips = pytest.mark.skipif(not (SHARED/"ucf101-mini").is_dir(), reason="no ../shared/data/ucf101-mini here")


@pytest.fixture(autouse=True)
def the_users_weights(monkeypatch):
    if WEIGHTS: monkeypatch.setenv("PENALTYANON_WEIGHTS", str(WEIGHTS.parents[1]))


def read_frames(name, count):
    import av
    with av.open(str(next((SHARED/"ucf101-mini").rglob(name)))) as film: return np.stack([f.to_ndarray(format="rgb24") for f, _ in zip(film.decode(video=0), range(count))])


@needs_weights
@needs_litert
@needs_clips
def test_both_engines_see_the_same_people():
    "Scores to 1e-3, landmarks to a fifth of a pixel, world points to a millimetre, masks but for a pixel in a thousand."
    frame = read_frames("v_Basketball_g01_c07.avi", 1)[0]
    lite, torch = BlazePose("litert"), BlazePose("torch")
    found = lite.detect(frame, 0.3)
    assert np.allclose([d.score for d in found], [d.score for d in torch.detect(frame, 0.3)], atol=1e-3) and len(found) >= 2
    rois = [d.roi for d in found]
    for a, b in zip(lite.pose(frame, rois), torch.pose(frame, rois), strict=True):
        assert (a is None) == (b is None)
        if a is None: continue
        assert np.abs(a.person.landmarks - b.person.landmarks).max() < 0.2 and np.abs(a.person.world - b.person.world).max() < 1e-3
        assert (a.person.mask != b.person.mask).mean() < 1e-3


@needs_weights
@needs_clips
def test_a_batch_is_its_squares_one_by_one():
    frame = read_frames("v_Basketball_g01_c07.avi", 1)[0]
    backend = BlazePose("torch", tiles=False)
    rois = [d.roi for d in backend.detect(frame, 0.3)][:2]
    together, alone = backend.pose(frame, rois), [backend.pose(frame, [roi])[0] for roi in rois]
    for a, b in zip(together, alone): assert np.allclose(a.person.landmarks, b.person.landmarks, atol=0.05)


def test_without_both_engines_there_is_one_line():
    code = ("import sys; sys.modules['torch'] = None; sys.modules['ai_edge_litert'] = None; from penaltyanon.avatar import blazepose; from penaltyanon.core.files import UserError\n"
            "blazepose.find_spec = lambda name: None\n"
            "try: blazepose.BlazePose()\nexcept UserError as e: print(e)")
    assert python("-c", code).strip() == "ai_edge_litert and torch: not installed; pip install 'penaltyanon[avatar]', or [train] for PyTorch"
