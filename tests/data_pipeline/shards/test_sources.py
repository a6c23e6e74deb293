"""Changes of source files after their shards were written."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from m2f.data_pipeline.config import DataConfig, DatasetConfig, MixtureItem, StorageConfig
from m2f.data_pipeline.errors import DataError, OutageError, StorageError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.order.order import build_order
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.readers.source_files import file_state
from m2f.data_pipeline.shards import codec
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.plan import clear_target, plan_shards
from m2f.data_pipeline.shards.sources import SourceChanges, compare_sources, require_source_files, write_record
from m2f.data_pipeline.shards.write import complete_parts, write_dataset, write_shard
from m2f.data_pipeline.sources import LabelMapSource
from m2f.data_pipeline.storage.storage import Storage
from tests.data_pipeline.coco_set import CocoSet

STORAGE = Storage()
CLASSES = [{"label": i, "name": name, "isthing": 0} for i, name in enumerate(("sky", "road", "tree"))]


def uncompressed(value):
    """Return a label map as PNG, whose size in bytes does not depend on `value`."""
    return cv2.imencode(".png", np.full((24, 32), value, np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes()


class LabelMapSet:
    """Data set of nine images with label maps, in about four shards."""

    def __init__(self, root):
        self.root = root
        for name in ("images", "labels"):
            (root / name).mkdir(parents=True)
        random = np.random.default_rng(0)
        for i in range(9):
            image = random.integers(0, 255, (24, 32, 3), dtype=np.uint8)
            (root / "images" / f"{i}.png").write_bytes(encode_png(image))
            (root / "labels" / f"{i}.png").write_bytes(uncompressed(i % 2))
        (root / "classes.json").write_text(json.dumps(CLASSES))
        self.at(root)

    def at(self, root):
        self.source = LabelMapSource(
            images=f"{root}/images", labels=f"{root}/labels", categories=f"{root}/classes.json"
        )
        return self

    @property
    def config(self):
        return DatasetConfig(shards=str(self.root / "shards"), source=self.source, shard_mb=0.03)

    def reader(self):
        return open_reader(self.source)

    def plan(self):
        return plan_shards(self.reader(), self.config, source_fingerprint(self.source))

    def write(self, **options):
        return write_dataset(self.reader(), self.config, STORAGE, **options)

    def compare(self, **options):
        return compare_sources(self.reader(), self.config.shards, len(self.plan().shard_keys), STORAGE, **options)

    def relabel(self, name, value):
        """Replace a label map by one of the same size in bytes and another modification time."""
        path = self.root / "labels" / f"{name}.png"
        size = path.stat().st_size
        path.write_bytes(uncompressed(value))
        assert path.stat().st_size == size
        advance_mtime(path)


@pytest.fixture
def maps(tmp_path):
    return LabelMapSet(tmp_path)


def advance_mtime(path, seconds=100):
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))


def labels_of(manifest, key):
    sample = manifest.read_sample(manifest.key.tolist().index(key), STORAGE)
    return [s.category_id for s in sample.annotation.segments]


def shard_mtimes(folder):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob("shards/*.tar")}


def shard_of(maps, key):
    return next(i for i, keys in enumerate(maps.plan().shard_keys) if key in keys)


def test_changed_label_map_rewrites_only_its_shard(maps):
    before = maps.write()
    assert len(before.shards) > 2
    assert labels_of(before, "3") == [1]
    mtimes_before = shard_mtimes(maps.config.shards)
    maps.relabel("3", 2)
    changes = maps.compare()
    assert changes.changed == (f"{maps.root}/labels/3.png",)
    assert changes.shards == {shard_of(maps, "3")}
    after = maps.write()
    assert labels_of(after, "3") == [2]
    assert after.fingerprint != before.fingerprint
    assert {n for n, t in shard_mtimes(maps.config.shards).items() if t != mtimes_before[n]} == {
        f"{shard_of(maps, '3'):05d}.tar"
    }
    assert maps.compare().changed == (), "known from now on"
    fresh = write_dataset(maps.reader(), replace(maps.config, shards=f"{maps.root}/fresh"), STORAGE)
    assert fresh.fingerprint == after.fingerprint, "as if it had been written at once"


def test_run_with_the_old_manifest_raises_error_on_rewritten_shards(maps):
    before = maps.write()
    maps.relabel("3", 2)
    after = maps.write()
    with pytest.raises(DataError, match="restart if the data set was rewritten"):
        before.read_sample(before.key.tolist().index("3"), STORAGE)
    data = DataConfig(train=(MixtureItem(dataset="train"),), task="semantic")
    orders = [build_order([manifest], 0, data) for manifest in (before, after)]
    assert orders[0].fingerprint != orders[1].fingerprint, "so that a resume is refused"


@pytest.mark.parametrize("kind", ["instances", "panoptic"])
@pytest.mark.parametrize("folder", ["images", "masks"])
def test_changed_images_and_panoptic_maps_are_detected(tmp_path, kind, folder):
    coco = CocoSet(tmp_path)
    coco.write()
    source = getattr(coco, f"{kind}_source")
    config = DatasetConfig(shards=str(tmp_path / "shards"), source=source)
    first = write_dataset(open_reader(source), config, STORAGE)
    if folder == "images":
        coco.files["a.jpg"] = cv2.imencode(".jpg", np.zeros((20, 30, 3), np.uint8))[1].tobytes()
    else:
        coco.ids[0] = coco.ids[19]
    documents = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    coco.write()
    assert documents == {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    advance_mtime(next((tmp_path / folder).iterdir()))
    again = write_dataset(open_reader(source), config, STORAGE)
    is_read = folder == "images" or kind == "panoptic"
    assert (again.fingerprint != first.fingerprint) == is_read


def test_changed_times_with_the_same_content_rewrite_nothing(maps):
    first = maps.write()
    mtimes_before = shard_mtimes(maps.config.shards)
    for path in maps.root.rglob("*.png"):
        advance_mtime(path)
    calls = []
    assert maps.compare(on_content=lambda: calls.append(1)).changed == ()
    assert calls == [1], "once"
    assert maps.compare(on_content=lambda: calls.append(2)).changed == ()
    assert calls == [1], "the new times are known"
    assert maps.write().fingerprint == first.fingerprint
    assert shard_mtimes(maps.config.shards) == mtimes_before


def test_copied_source_keeps_the_shards(maps):
    first = maps.write()
    copy = maps.root / "elsewhere"
    for name in ("images", "labels"):
        shutil.copytree(maps.root / name, copy / name, copy_function=shutil.copyfile)
    shutil.copyfile(maps.root / "classes.json", copy / "classes.json")
    for path in copy.rglob("*.png"):
        advance_mtime(path, -500)
    mtimes_before = shard_mtimes(maps.config.shards)
    maps.at(copy)
    assert maps.write().fingerprint == first.fingerprint
    assert shard_mtimes(maps.config.shards) == mtimes_before


def test_read_only_store_compares_contents_every_time(maps, monkeypatch):
    maps.write()
    advance_mtime(maps.root / "labels" / "4.png")

    def refuse(*_, **__):
        raise StorageError("read-only")

    monkeypatch.setattr(Storage, "put", refuse)
    for _ in range(2):
        calls = []
        assert maps.compare(on_content=lambda calls=calls: calls.append(1)).changed == ()
        assert calls == [1]


def test_an_outage_while_reading_a_record_is_raised_and_not_taken_for_damage(maps, monkeypatch):
    maps.write()

    def fail(_, url):
        raise OutageError(f"{url}: no answer")

    monkeypatch.setattr(Storage, "get", fail)
    with pytest.raises(OutageError, match=r"sources/\d+\.parquet: no answer"):
        maps.compare()


def test_missing_source_files_do_not_rewrite_their_shards(tmp_path):
    coco = CocoSet(tmp_path)
    coco.write()
    config = DatasetConfig(shards=str(tmp_path / "shards"), source=coco.instances_source)
    first = write_dataset(open_reader(config.source), config, STORAGE)
    (tmp_path / "images" / "a.jpg").unlink()
    changes = compare_sources(open_reader(config.source), config.shards, 1, STORAGE)
    assert (changes.num_missing, changes.changed) == (1, ())
    assert write_dataset(open_reader(config.source), config, STORAGE).fingerprint == first.fingerprint


@pytest.mark.parametrize("deleted", ["images", "images and labels"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_deleted_source_files_keep_the_data_set_and_redo_is_refused(maps, deleted, skip_bad):
    first = maps.write()
    count = len(first.shards)
    paths = [path for name in deleted.split(" and ") for path in (maps.root / name).iterdir()]
    maps_reader = maps.reader()  # later, the folders are not mounted, but the list of samples is known
    for path in paths:
        path.unlink()
    config = replace(maps.config, shard_mb=1.0)  # the number of shards of a new plan differs
    before = {path: path.read_bytes() for path in Path(config.shards).rglob("*") if path.is_file()}
    assert len(plan_shards(maps_reader, config, "").shard_keys) < count
    assert write_dataset(maps_reader, config, STORAGE, skip_bad=skip_bad).fingerprint == first.fingerprint
    with pytest.raises(
        DataError, match=rf"{len(paths)} source files .* cannot be read .*images/.* more\)\. The existing"
    ):
        write_dataset(maps_reader, config, STORAGE, skip_bad=skip_bad, redo=True)
    assert {path: path.read_bytes() for path in Path(config.shards).rglob("*") if path.is_file()} == before


class CountedPath(str):
    """Path that counts how often a set or dictionary looks up such a path."""

    count = 0

    def __hash__(self):
        CountedPath.count += 1
        return super().__hash__()


def test_the_effort_per_sample_does_not_grow_with_the_number_of_missing_files(tmp_path):
    counts = []
    for length in (50, 100):
        paths = [CountedPath(tmp_path / f"{i}.png") for i in range(length)]
        reader = SimpleNamespace(keys=[str(i) for i in range(length)], files=lambda i, paths=paths: (paths[i],))
        CountedPath.count = 0
        with pytest.raises(DataError, match=f"{length} source files"):
            require_source_files(reader, reader.keys, "target", skip_bad=True)
        counts.append(CountedPath.count / length)
    assert counts[0] == counts[1]


def test_number_of_shards_of_a_data_set_that_was_never_complete_is_not_kept(maps):
    complete_parts(maps.plan(), STORAGE)
    with pytest.raises(DataError, match="number of shards: 4 there, 1 here"):
        write_dataset(maps.reader(), replace(maps.config, shard_mb=1.0), STORAGE)


def test_shard_with_changed_and_missing_files_is_not_rewritten(maps):
    first = maps.write()
    changed, missing = next(keys for keys in maps.plan().shard_keys if len(keys) > 1)[:2]
    maps.relabel(changed, 2)
    image, reader = maps.root / "images" / f"{missing}.png", maps.reader()
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(DataError, match=rf"1 source file .* cannot be read \({image}\)\. The existing files are kept"):
        write_dataset(reader, maps.config, STORAGE)
    assert Manifest.load(first.url, STORAGE).fingerprint == first.fingerprint
    image.write_bytes(content)
    assert labels_of(maps.write(), changed) == [2]


def test_outdated_parts_with_missing_files_are_kept_when_another_shard_changes(maps, monkeypatch):
    first = maps.write()
    changed, missing = (keys[0] for keys in maps.plan().shard_keys[:2])
    maps.relabel(changed, 2)
    reader = maps.reader()
    (maps.root / "images" / f"{missing}.png").unlink()
    monkeypatch.setattr(codec, "VERSION", codec.VERSION + 1)  # all shards would be rewritten
    with pytest.raises(DataError, match="1 source file of the shards to be written again cannot be read"):
        write_dataset(reader, maps.config, STORAGE)
    assert Manifest.load(first.url, STORAGE).fingerprint == first.fingerprint


class UndeletableStorage(Storage):
    """Storage that keeps deleted objects, like S3Store in a bucket that denies deletion."""

    def delete(self, url):
        pass


@pytest.mark.parametrize("redo", [False, True])
def test_store_that_denies_deletion_raises_error_and_keeps_the_shards(maps, redo):
    first = maps.write()
    maps.relabel("3", 2)
    with pytest.raises(StorageError, match=r"dataset\.json could not be deleted, so no shard was changed"):
        write_dataset(maps.reader(), maps.config, UndeletableStorage(), redo=redo)
    assert labels_of(Manifest.load(first.url, STORAGE), "3") == [1]


def test_repaired_or_restored_source_files_are_added_to_the_shards(tmp_path):
    coco = CocoSet(tmp_path)
    good = coco.files["a.jpg"]
    for number, name in enumerate(("b.jpg", "c.jpg"), 41):
        coco.images.append({**coco.images[0], "id": number, "file_name": name})
    coco.files["b.jpg"] = b"no image"
    coco.write()
    config = DatasetConfig(shards=str(tmp_path / "shards"), source=coco.instances_source, shard_mb=1e6)
    assert write_dataset(open_reader(config.source), config, STORAGE, skip_bad=True).key.tolist() == ["a"]
    assert compare_sources(open_reader(config.source), config.shards, 1, STORAGE).changed == ()
    for name in ("b.jpg", "c.jpg"):
        (tmp_path / "images" / name).write_bytes(good)
        manifest = write_dataset(open_reader(config.source), config, STORAGE, skip_bad=True)
        assert name[0] in manifest.key.tolist()
    assert sorted(manifest.key.tolist()) == ["a", "b", "c"]


def test_shards_without_a_source_record_are_kept(maps):
    first = maps.write()
    shutil.rmtree(maps.root / "shards" / "sources")
    maps.relabel("3", 2)
    assert maps.compare() == SourceChanges()
    assert maps.write().fingerprint == first.fingerprint


def test_damaged_source_record_is_ignored(maps):
    maps.write()
    for path in (maps.root / "shards" / "sources").iterdir():
        path.write_bytes(b"no parquet")
    maps.relabel("3", 2)
    assert maps.compare() == SourceChanges()


def test_source_record_of_another_plan_is_ignored(maps):
    maps.write()
    for name in ("dataset.json", "plan.json"):
        (maps.root / "shards" / name).unlink()
    for folder in ("images", "labels"):
        (maps.root / folder / "3.png").rename(maps.root / folder / "new.png")
    assert shard_of(maps, "new") not in maps.compare().digests
    assert "new" in maps.write().key.tolist()


def test_resumed_job_detects_changed_source_files(maps):
    plan = maps.plan()
    for index in range(len(plan.shard_keys)):
        write_shard(maps.reader(), plan, index, STORAGE)
    maps.relabel("3", 2)
    changes = maps.compare()
    parts = complete_parts(plan, STORAGE, changes)
    assert {part.index for part in parts} == set(range(len(plan.shard_keys))) - changes.shards
    assert labels_of(maps.write(), "3") == [2]


def test_receipt_older_than_its_shard_is_ignored(maps):
    """A task wrote the shard and its record, and died before the receipt. Equal sizes do not prove that they match."""
    plan = maps.plan()
    part = write_shard(maps.reader(), plan, 0, STORAGE)
    reader = maps.reader()
    key = plan.shard_keys[0][0]
    assert [p.index for p in complete_parts(plan, STORAGE, maps.compare())] == [0]
    receipt = (maps.root / "shards" / "parts" / "00000.parquet").read_bytes()
    maps.relabel(key, 2)
    write_shard(reader, plan, 0, STORAGE)
    (maps.root / "shards" / "parts" / "00000.parquet").write_bytes(receipt)
    changes = maps.compare()
    assert changes.changed == ()
    assert changes.digests[0] != part.info.sha256
    assert complete_parts(plan, STORAGE, changes) == ()
    assert labels_of(maps.write(), key) == [2]


def test_redo_rewrites_all_shards_and_keeps_other_files(maps):
    first = maps.write()
    target = Path(maps.config.shards)
    mtimes_before = shard_mtimes(target)
    (target / "notes.txt").write_text("mine")
    (target / "shards" / "00099.tar").write_bytes(b"of a longer plan")
    (target / "shards" / "other.tar").write_bytes(b"mine")
    again = maps.write(redo=True)
    assert again.fingerprint == first.fingerprint
    assert all(time != mtimes_before[name] for name, time in shard_mtimes(target).items() if name in mtimes_before)
    assert not (target / "shards" / "00099.tar").exists()
    assert (target / "notes.txt").exists()
    assert (target / "shards" / "other.tar").exists()


def test_changed_annotation_files_are_refused_without_redo(maps):
    maps.write()
    (maps.root / "classes.json").write_text(json.dumps([CLASSES[2], *CLASSES[:2]]))
    message = r"different: settings or annotation files of the source\); .*`m2f shard --redo`"
    with pytest.raises(DataError, match=message):
        maps.write()
    assert [c.name for c in maps.write(redo=True).categories.categories] == ["tree", "sky", "road"]
    (maps.root / "images" / "10.png").write_bytes((maps.root / "images" / "1.png").read_bytes())
    (maps.root / "labels" / "10.png").write_bytes((maps.root / "labels" / "1.png").read_bytes())
    with pytest.raises(DataError, match=r"different: samples: 9 there, 10 here"):
        maps.write()
    assert maps.write(redo=True).num_samples == 10


def test_shards_in_s3_are_rewritten_for_changed_sources(maps, s3_endpoint):
    storage = Storage(StorageConfig(endpoint_url=s3_endpoint))
    config = replace(maps.config, shards="s3://box/follow/train")
    first = write_dataset(maps.reader(), config, storage)
    maps.relabel("3", 2)
    second = write_dataset(maps.reader(), config, storage)
    assert second.fingerprint != first.fingerprint
    assert second.fingerprint == maps.write().fingerprint
    storage.put("s3://box/follow/train/notes.txt", b"mine")
    assert write_dataset(maps.reader(), config, storage, redo=True).fingerprint == second.fingerprint
    assert storage.get("s3://box/follow/train/notes.txt") == b"mine"


def test_redo_is_refused_for_a_manifest_of_foreign_tars(maps):
    maps.write()
    path = Path(maps.config.shards, "dataset.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "foreign": {"labels": "classes"}}))
    with pytest.raises(DataError, match="manifest of `m2f index`"):
        clear_target(maps.config.shards, STORAGE)
    assert list(Path(maps.config.shards).glob("shards/*.tar"))


def test_source_files_are_read_once(maps, monkeypatch):
    reads = []
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (reads.append(self), opened(self, *a, **k))[1])
    maps.write()
    source = [path for path in reads if path.suffix == ".png"]
    assert len(source) == len({*source}) == 18


def test_file_state_describes_an_existing_file(tmp_path):
    path = tmp_path / "x"
    assert file_state(path) is None
    path.write_bytes(b"abc")
    state = file_state(path)
    assert (state.size, state.mtime_ns) == (3, path.stat().st_mtime_ns)
    assert state.digest.hex().startswith("ba7816bf")
    write_record(str(tmp_path), 0, "x", (), STORAGE)
    assert not (tmp_path / "sources").exists(), "nothing is written where there are no files"
