"""How many faces and persons of 30 frames the detectors find, and how many are hidden with widening and tracker.

    python tools/measure_regions.py FOLDER people faces persons     # FOLDER holds ucf101-mini and hmdb51-mini

The boxes in region_boxes.csv were drawn by hand on enlarged frames: 30 clips and a frame of each, drawn with seed 15 from all clips.
kind: face (eyes, nose and mouth can be made out, profiles too), person (head or trunk visible), limbs (a person of whom only
arms or legs are seen), unclear (a crowd, a head turned away, pictures on a wall: counted neither as missed nor as false).
"""
import csv, sys, time
from itertools import groupby
from pathlib import Path
import numpy as np
from penaltyanon.data.detectors import fill_boxes, open_detector
from penaltyanon.edge.streams import decode_frames
from penaltyanon.edge.tracker import RegionLog, TrackSettings, region_stage, widen_boxes

FOLDERS = {"ucf101": "ucf101-mini/UCF-101", "hmdb51": "hmdb51-mini/hmdb51_org"}
OF_INTEREST = {"faces": "face"}
BEFORE = 24     # frames that the tracker sees before the one that is judged


def read_truth(path=Path(__file__).with_name("region_boxes.csv")):
    "The labelled frames: ((set, file, frame), {kind: boxes})."
    rows = list(csv.DictReader(path.open()))
    for key, group in groupby(rows, key=lambda r: (r["set"], r["file"], int(r["frame"]))):
        boxes = [(r["kind"], [float(r[c]) for c in ("x1", "y1", "x2", "y2")]) for r in group]
        yield key, {kind: np.array([b for k, b in boxes if k == kind]) for kind, _ in boxes if kind != "nobody"}


def covered(box, hidden):
    "The part of a box that is hidden."
    x1, y1, x2, y2 = np.asarray(box, int)
    return hidden[y1:y2, x1:x2].mean()


def judge_frame(frames, t, truth, detect, settings):
    "What a detector does in one frame: parts hidden of each labelled box, false boxes, CPU time."
    began, rgb = time.process_time(), frames[t].rgb
    found = detect(rgb)
    seconds, size = time.process_time() - began, rgb.shape[:2]
    window = frames[max(0, t - BEFORE):t + settings.ahead + 1]
    tracked = next(f for f in region_stage(window, detect, settings, RegionLog()) if f.pts == frames[t].pts)
    masks = dict(found=fill_boxes(found, *size), widened=fill_boxes(widen_boxes(found, settings.widen), *size),
                 tracked=np.zeros(size, bool) if tracked.hidden is None else fill_boxes(tracked.hidden, *size))
    masks["command"] = masks["tracked"] if masks["tracked"].any() else ~masks["tracked"]
    parts = {(kind, how): [covered(box, mask) for box in boxes] for kind, boxes in truth.items() for how, mask in masks.items()}
    labelled = fill_boxes(np.concatenate(list(truth.values()) or [np.zeros((0, 4))]), *size)
    inside = [covered(np.clip(box, 0, (size[1], size[0]) * 2), labelled) for box in found]
    return parts, sum(part < 1 / 3 for part in inside), seconds, {how: mask.mean() for how, mask in masks.items()}


def measure(folder, spec, settings=TrackSettings()):
    "One detector on all labelled frames."
    detect, judged, missed = open_detector(spec), [], []
    for (name, file, t), truth in read_truth():
        frames = list(decode_frames(Path(folder)/FOLDERS[name]/file))
        judged.append(judge_frame(frames, t, truth, detect, settings))
        missed += [f"{Path(file).stem} {t}: {kind}" for kind, how in judged[-1][0] if how == "tracked"
                   for part in judged[-1][0][kind, how] if part < .9 and kind == OF_INTEREST.get(spec, "person")]
    for kind in ("face", "person", "limbs"):
        line = []
        for how, least in (("found", .5), ("found", .9), ("widened", .9), ("tracked", .9), ("command", .9)):
            parts = [p for one in judged for p in one[0].get((kind, how), [])]
            line.append(f"{how} >= {least}: {sum(p >= least for p in parts)} of {len(parts)}")
        print(f"{spec:10} {kind:7}", "   ".join(line))
    shares = {how: np.mean([one[3][how] for one in judged]) for how in judged[0][3]}
    print(f"{spec:10} false boxes {sum(one[1] for one in judged)}, {1000 * np.median([one[2] for one in judged]):.0f} ms of CPU a frame,",
          "part of the frames hidden", {how: round(float(share), 2) for how, share in shares.items()})
    print(*(f"    not hidden: {line}" for line in missed), sep="\n")


if __name__ == "__main__":
    if len(sys.argv) < 3: sys.exit(__doc__)
    for spec in sys.argv[2:]: measure(sys.argv[1], spec)
