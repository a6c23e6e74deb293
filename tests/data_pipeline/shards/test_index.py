"""`m2f index` turns existing tars into data sets with the same pixels, or states why it cannot."""

import io
import itertools
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset

from m2f.cluster.cli import main
from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.config import DataConfig, DatasetConfig, LargeScaleJitter, MixtureItem
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.loading.loader import LoaderSpec, build_loader
from m2f.data_pipeline.order.order import build_order
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.index import IndexOptions, detect_format, find_tars, index_tars
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.preview import write_contact_sheet
from m2f.data_pipeline.shards.verify import verify
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import CocoPanopticSource, HuggingFaceSource, LabelMapSource, SyntheticSource
from m2f.data_pipeline.storage import stream as object_stream
from m2f.data_pipeline.storage.storage import Storage

STORAGE = Storage()
CLASSES = [
    {"label": 0, "id": 0, "name": "road", "isthing": 0, "color": [90, 90, 90]},
    {"label": 3, "id": 3, "name": "car", "isthing": 1, "color": [0, 0, 200]},
    {"label": 7, "id": 7, "name": "sky", "isthing": 0, "color": [90, 160, 250]},
]
TABLE = CategoryTable(tuple(Category(c["label"], c["name"], bool(c["isthing"]), tuple(c["color"])) for c in CLASSES))
OPTIONS = IndexOptions(categories=TABLE, labels="classes", max_pixels=10_000)
EXTENSIONS = {"instances": {"image": "img.png", "map": "seg.png"}}


def image(index, ext="jpg"):
    pixels = np.random.default_rng(index).integers(0, 255, (20 + index, 30, 3), dtype=np.uint8)
    return cv2.imencode(f".{ext}", pixels)[1].tobytes()


def class_map(index):
    values = np.full((20 + index, 30), 7, np.uint8)
    values[8:] = 0
    values[10:14, 4:9] = 3
    values[:2] = 255
    return values


def color_map(index):
    """Return a map [H, W, 3]: red is the class (255 is void), green the number of the instance."""
    values = class_map(index)
    colors = np.zeros((*values.shape, 3), np.uint8)
    colors[..., 0] = values
    colors[10:14, 4:6, 1] = 1
    colors[10:14, 6:9, 1] = 2
    return colors


def panoptic(index):
    """Return segment ids encoded as colours [H, W, 3], and the JSON of the segments."""
    values = class_map(index)
    ids = {7: 70_000, 0: 12, 3: 300}
    segment_ids = np.zeros(values.shape, np.int64)
    for label, segment in ids.items():
        segment_ids[values == label] = segment
    colors = np.stack([segment_ids % 256, segment_ids // 256 % 256, segment_ids // 65536], axis=-1).astype(np.uint8)
    entries = [{"id": segment, "category_id": label, "iscrowd": int(label == 3)} for label, segment in ids.items()]
    return colors, {"segments_info": entries, "image_id": index}


def members_of(index, kind):
    match kind:
        case "classes":
            return {"jpg": image(index), "png": encode_png(class_map(index))}
        case "instances":
            return {"img.png": image(index, "png"), "seg.png": encode_png(color_map(index))}
        case "panoptic":
            colors, description = panoptic(index)
            return {"jpg": image(index), "png": encode_png(colors), "json": json.dumps(description).encode()}


def write_tar(path, samples, **options):
    """Write `{key: {extension: content}}` as a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(folder, kind, count=12, per_tar=5):
    samples = {f"{i:04d}": members_of(i, kind) for i in range(count)}
    for number in range(0, count, per_tar):
        part = dict(list(samples.items())[number : number + per_tar])
        write_tar(folder / f"{number // per_tar:03d}.tar", part)
    return samples


def index(source, target, options=OPTIONS, **settings):
    tars = find_tars([str(source)], STORAGE)
    return index_tars(tars, str(target), detect_format(tars[0], options, STORAGE), options, STORAGE, **settings)


def raw_source(folder, samples, kind):
    """Write the images and labels as separate files, and return the source that reads them."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    listed, annotations = [], []
    for number, (key, members) in enumerate(samples.items()):
        image_ext, map_ext = ("img.png", "seg.png") if kind == "instances" else ("jpg", "png")
        (folder / "images" / f"{key}.{image_ext[-3:]}").write_bytes(members[image_ext])
        (folder / "labels" / f"{key}.png").write_bytes(members[map_ext])
        if kind == "panoptic":
            listed.append({"id": number, "file_name": f"{key}.jpg", "height": 20 + number, "width": 30})
            entries = json.loads(members["json"])["segments_info"]
            annotations.append({"image_id": number, "file_name": f"{key}.png", "segments_info": entries})
    document = {"images": listed, "annotations": annotations, "categories": CLASSES}
    (folder / "classes.json").write_text(json.dumps(document if kind == "panoptic" else CLASSES))
    images, labels, classes = (str(folder / name) for name in ("images", "labels", "classes.json"))
    match kind:
        case "classes":
            return LabelMapSource(images=images, labels=labels, categories=classes)
        case "instances":
            return HuggingFaceSource(images=images, annotations=labels, categories=classes, void=(255,))
        case "panoptic":
            return CocoPanopticSource(images=images, panoptic_json=classes, panoptic_masks=labels)


@pytest.mark.parametrize("kind", ["classes", "instances", "panoptic"])
def test_indexed_tars_give_the_same_samples_as_shards(tmp_path, kind):
    samples = write_tars(tmp_path / "tars", kind)
    before = {path: path.read_bytes() for path in (tmp_path / "tars").iterdir()}
    options = replace(OPTIONS, labels=kind, **EXTENSIONS.get(kind, {}))
    result = index(tmp_path / "tars", tmp_path / "set", options, threads=2)
    assert result.committed
    assert (result.num_samples, result.num_shards) == (12, 3)
    assert {path: path.read_bytes() for path in (tmp_path / "tars").iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["dataset.json", "samples.parquet"]
    assert verify(str(tmp_path / "set"), STORAGE, "full").faults == ()

    indexed = Manifest.load(str(tmp_path / "set"), STORAGE)
    source = raw_source(tmp_path / "raw", samples, kind)
    written = write_dataset(open_reader(source), DatasetConfig(shards=str(tmp_path / "shards"), source=source), STORAGE)
    row_of = {key: row for row, key in enumerate(written.key)}
    assert sorted(indexed.key) == sorted(written.key)
    for row, key in enumerate(indexed.key):
        expected, actual = written.read_sample(row_of[key], STORAGE), indexed.read_sample(row, STORAGE)
        assert np.array_equal(expected.image, actual.image)
        pixels = [
            {s.category_id: sample.annotation.seg == s.id for s in sample.annotation.segments}
            for sample in (expected, actual)
        ]
        assert pixels[0].keys() == pixels[1].keys()
        summary = [
            sorted((s.category_id, s.is_thing, s.is_crowd, s.area, tuple(s.bbox)) for s in sample.annotation.segments)
            for sample in (expected, actual)
        ]
        assert summary[0] == summary[1]
        assert all(np.array_equal(pixels[0][c], pixels[1][c]) for c in pixels[0])
    assert [s.num_pixels for s in indexed.statistics()] == [s.num_pixels for s in written.statistics()]


def load_steps(manifest, steps, **changes):
    data = DataConfig(
        train=(MixtureItem(dataset="a"),),
        augment=LargeScaleJitter(size=32),
        task="semantic",
        lanes=2,
        window=4,
        **changes,
    )
    spec = LoaderSpec(global_batch=3, micro_batch=3, rank=0, world=1, start_step=0, seed=1)
    loader = build_loader([manifest], build_order([manifest], 1, data), data, Storage(), spec)
    try:
        return [batch for step in itertools.islice(loader, steps) for batch in step.micro_batches]
    finally:
        loader.close()


def test_training_reads_indexed_tars(tmp_path):
    write_tars(tmp_path / "tars", "classes")
    index(tmp_path / "tars", tmp_path / "set")
    manifest = Manifest.load(str(tmp_path / "set"), STORAGE)
    batches = load_steps(manifest, 4, workers=0)
    assert sorted(key for batch in batches for key in batch.keys) == sorted(f"{i:04d}" for i in range(12))
    assert {int(label) for b in batches for label in b.targets.labels[b.targets.valid]} == {0, 1, 2}
    for first, with_workers in zip(batches, load_steps(manifest, 4, workers=1), strict=True):
        assert (first.images == with_workers.images).all()
        assert (first.targets.id_maps == with_workers.targets.id_maps).all()
    write_contact_sheet(manifest, [0, 5], STORAGE, str(tmp_path / "sheet.png"))
    assert cv2.imread(str(tmp_path / "sheet.png")) is not None


def test_index_restores_the_manifest_of_m2f_shards(tmp_path):
    source = SyntheticSource(num_images=6, seed=3)
    reader = open_reader(source)
    written = write_dataset(reader, DatasetConfig(shards=str(tmp_path / "set"), source=source, shard_mb=0.06), STORAGE)
    for name in ("dataset.json", "samples.parquet"):
        (tmp_path / "set" / name).unlink()
    result = index(tmp_path / "set", tmp_path / "set", replace(OPTIONS, categories=reader.categories, labels=None))
    assert (result.form, result.renumbered) == ("m2f", False)
    again = Manifest.load(str(tmp_path / "set"), STORAGE)
    assert again.fingerprint == written.fingerprint
    assert again.shards == written.shards
    for name in ("key", "offset", "length", "crc32", "image_id", "num_segments"):
        assert getattr(again, name).tolist() == getattr(written, name).tolist()


def test_repeated_image_ids_of_m2f_shards_are_renumbered(tmp_path, capsys):
    for seed in (3, 4):
        source = SyntheticSource(num_images=3, seed=seed)
        write_dataset(open_reader(source), DatasetConfig(shards=str(tmp_path / f"{seed}"), source=source), STORAGE)
    categories = [
        {"label": c.id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)}
        for c in open_reader(source).categories.categories
    ]
    (tmp_path / "classes.json").write_text(json.dumps(categories))
    target = str(tmp_path / "both")
    options = ["--output", target, "--categories", str(tmp_path / "classes.json")]
    assert main(["index", str(tmp_path / "3"), str(tmp_path / "4"), *options]) == 0
    assert "image ids in the tars repeat; the manifest replaces them" in capsys.readouterr().out
    manifest = Manifest.load(target, STORAGE)
    assert manifest.image_id.tolist() == list(range(6))
    assert [manifest.read_sample(row, STORAGE).image_id for row in range(6)] == list(range(6))
    assert verify(target, STORAGE, "full").faults == ()


def test_tars_of_webdataset_and_long_names_are_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr(object_stream, "_BLOCK", 1500)  # so that samples extend over several blocks
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for i in range(3):
            writer.write({"__key__": f"folder/sub_{i}", **members_of(i, "classes")})
    long = "n" * 140
    write_tar(tmp_path / "gnu.tar", {f"{long}1": members_of(4, "classes")}, format=tarfile.GNU_FORMAT)
    write_tar(tmp_path / "pax.tar", {f"{long}\u00e92": members_of(5, "classes")}, format=tarfile.PAX_FORMAT)
    assert index(tmp_path, tmp_path).num_samples == 5
    manifest = Manifest.load(str(tmp_path), STORAGE)
    assert manifest.key.tolist() == ["folder/sub_0", "folder/sub_1", "folder/sub_2", f"{long}1", f"{long}\u00e92"]
    assert [shard.name for shard in manifest.shards] == ["a.tar", "gnu.tar", "pax.tar"]
    for row, number in enumerate((0, 1, 2, 4, 5)):
        assert manifest.read_members(row, STORAGE)["jpg"] == image(number)
    assert verify(str(tmp_path), STORAGE, "full").faults == ()


def corrupt(samples, **changes):
    """Return the samples with changed members of sample 2; None removes a member."""
    key = sorted(samples)[2]
    members = {**samples[key], **changes}
    return {**samples, key: {name: data for name, data in members.items() if data is not None}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"png": None}, "has no label member png"),
        ({"jpg": None}, "must be the image"),
        ({"jpg": image(2)[:200]}, "truncated"),
        ({"jpg": image(9)}, "check that they match"),
        ({"png": encode_png(np.full((22, 30), 9, np.uint8))}, "neither categories nor void"),
        ({"png": encode_png(np.zeros((500, 500), np.uint8))}, "exceed max_pixels"),
        ({"png": encode_png(color_map(2))}, "must be a grey or palette PNG"),
        ({"png": b"hello"}, "not a JPEG, PNG, TIFF"),
    ],
)
def test_samples_that_cannot_be_indexed_are_faults(tmp_path, changes, message):
    samples = {f"{i:04d}": members_of(i, "classes") for i in range(5)}
    write_tar(tmp_path / "a.tar", corrupt(samples, **changes))
    result = index(tmp_path, tmp_path / "set")
    assert not result.committed
    assert not (tmp_path / "set").exists()
    (fault,) = result.faults
    assert message in str(fault)
    assert fault.key == "0002"
    assert fault.object == str(tmp_path / "a.tar")
    assert fault.offset
    assert index(tmp_path, tmp_path / "set", skip_bad=True).num_samples == 4
    assert "0002" not in Manifest.load(str(tmp_path / "set"), STORAGE).key


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (b"{", "no usable `segments_info`"),
        (b"[" * 100_000, "no usable `segments_info`"),
        (b'{"segments_info": [{"id": 12, "category_id": 99}]}', "no usable `segments_info` of known categories"),
        (b'{"segments_info": [{"id": 12, "category_id": 0}]}', "are not listed in its json"),
    ],
)
def test_panoptic_descriptions_that_do_not_match_are_faults(tmp_path, description, message):
    samples = {f"{i:04d}": members_of(i, "panoptic") for i in range(3)}
    write_tar(tmp_path / "a.tar", corrupt(samples, json=description))
    options = replace(OPTIONS, labels="panoptic")
    (fault,) = index(tmp_path, tmp_path / "set", options).faults
    assert message in str(fault)
    extra = json.loads(samples["0002"]["json"])
    extra["segments_info"].append({"id": 5, "category_id": 0})
    write_tar(tmp_path / "a.tar", corrupt(samples, json=json.dumps(extra).encode()))
    (fault,) = index(tmp_path, tmp_path / "set", options).faults
    assert "segments without a pixel: 5" in str(fault)


def test_files_of_a_sample_must_be_adjacent(tmp_path):
    a, b = members_of(0, "classes"), members_of(1, "classes")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [
            ("a.jpg", a["jpg"]),
            ("a.png", a["png"]),
            ("b.jpg", b["jpg"]),
            ("b.png", b["png"]),
            ("a.txt", b""),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (fault,) = index(tmp_path, tmp_path / "set").faults
    assert fault.key == "a"
    assert "not next to each other" in fault.problem


def test_keys_must_be_unique_over_all_tars(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, {"same": members_of(0, "classes"), name[0]: members_of(1, "classes")})
    (fault,) = index(tmp_path, tmp_path / "set").faults
    assert (fault.key, fault.object) == ("same", str(tmp_path / "b.tar"))
    assert str(tmp_path / "a.tar") in fault.problem


@pytest.mark.parametrize("name", ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg"])
def test_paths_outside_the_folder_are_refused_and_nothing_is_written(tmp_path, name):
    target = tmp_path / "deep" / "set"
    write_tar(tmp_path / "tars" / "a.tar", {"good": members_of(0, "classes")})
    with tarfile.open(tmp_path / "tars" / "a.tar", "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    before = sorted(tmp_path.rglob("*"))
    (fault,) = index(tmp_path / "tars", target).faults
    assert "is not a path inside its folder" in fault.problem
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/etc/x.jpg").exists()


def test_links_and_devices_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"good": members_of(0, "classes")})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        info = tarfile.TarInfo("link.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    (fault,) = index(tmp_path, tmp_path / "set").faults
    assert "is not a regular file" in fault.problem


def test_truncated_or_damaged_tars_are_faults(tmp_path):
    samples = {f"{i:04d}": members_of(i, "classes") for i in range(4)}
    intact = write_tar(tmp_path / "whole" / "a.tar", samples).read_bytes()
    index(tmp_path / "whole", tmp_path / "whole")
    manifest = Manifest.load(str(tmp_path / "whole"), STORAGE)
    boundary, middle = int(manifest.offset[2]), int(manifest.offset[2]) + 700
    garbled = bytearray(intact)
    garbled[boundary : boundary + 512] = b"\7" * 512
    zeroed = bytearray(intact)
    zeroed[boundary : boundary + 1024] = bytes(1024)
    cases = {
        "border": (intact[:boundary], "no end marker"),
        "middle": (intact[:middle], "truncated"),
        "garbled": (bytes(garbled), "header is damaged"),
        "zeroed": (bytes(zeroed), "header is damaged, or another tar follows"),
        "joined": (intact + intact, "another tar follows"),
        "no_tar": (b"hello" * 400, "not a tar, or is truncated"),
        "empty": (b"", "not a tar, or is truncated"),
        "gzip": (b"\x1f\x8b" + intact, "compressed (gzip)"),
    }
    for name, (data, message) in cases.items():
        folder = tmp_path / name
        write_tar(folder / "0.tar", {"first": members_of(7, "classes")})
        (folder / "b.tar").write_bytes(data)
        result = index(folder, folder / "set")
        assert not result.committed
        assert any(message in str(fault) for fault in result.faults), (name, result.faults)
        assert all(fault.object == str(folder / "b.tar") for fault in result.faults)


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        (members_of(0, "classes"), {"labels": None}, r"its members are jpg, png\. Give --labels \(now None\)"),
        (members_of(0, "instances"), {}, r"members are img.png, seg.png\. Give .* with --image \(now jpg\)"),
        ({"jpg": image(0)}, {}, r"its members are jpg\. Give .* --map \(now png\)"),
        ({"jpg": image(0), "png": image(0, "png")}, {"map": "seg"}, r"--map \(now seg\)"),
        (members_of(0, "classes"), {"labels": "panoptic"}, r"with --json \(now json\)"),
    ],
)
def test_first_sample_without_the_expected_members_is_refused(tmp_path, members, options, message):
    tar = write_tar(tmp_path / "a.tar", {"x": members})
    with pytest.raises(DataError, match=message):
        detect_format(str(tar), replace(OPTIONS, **options), STORAGE)


def test_missing_and_repeated_tars_are_refused(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"x": members_of(0, "classes")})
    with pytest.raises(DataError, match="no tar was found at"):
        find_tars([str(tmp_path / "nowhere")], STORAGE)
    with pytest.raises(DataError, match="given twice"):
        find_tars([str(tar), str(tmp_path)], STORAGE)


def test_tars_in_linked_folders_are_found(tmp_path):
    for name in ("set", "disk"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", {"a": members_of(0, "classes")})
    (tmp_path / "set/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "set/loop").symlink_to(tmp_path / "set")
    folder = str(tmp_path / "set")
    assert find_tars([folder], STORAGE) == (f"{folder}/0.tar", f"{folder}/linked/0.tar")


def test_index_refuses_to_replace_another_data_set(tmp_path):
    write_tars(tmp_path / "tars", "classes", count=3)
    assert index(tmp_path / "tars", tmp_path / "set").committed
    before = (tmp_path / "set" / "dataset.json").read_bytes()
    assert index(tmp_path / "tars", tmp_path / "set").committed  # indexing the same tars again is accepted
    write_tars(tmp_path / "tars", "classes", count=4)
    with pytest.raises(DataError, match="already contains another data set"):
        index(tmp_path / "tars", tmp_path / "set")
    assert (tmp_path / "set" / "dataset.json").read_bytes() == before
    source = SyntheticSource(num_images=2)
    write_dataset(open_reader(source), DatasetConfig(shards=str(tmp_path / "own"), source=source), STORAGE)
    with pytest.raises(DataError, match="already contains another data set"):
        index(tmp_path / "tars", tmp_path / "own")


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_index_restores_lost_or_damaged_samples(tmp_path, content):
    write_tars(tmp_path / "tars", "classes", count=3)
    index(tmp_path / "tars", tmp_path / "set")
    samples = tmp_path / "set" / "samples.parquet"
    before = samples.read_bytes()
    if content is None:
        samples.unlink()
    else:
        samples.write_bytes(content)
    assert index(tmp_path / "tars", tmp_path / "set").committed
    assert samples.read_bytes() == before
    assert Manifest.load(str(tmp_path / "set"), STORAGE).num_samples == 3


def test_index_command_reads_from_and_writes_to_s3(tmp_path, bucket, capsys):
    tars = f"{bucket}/a"
    storage = Storage()
    write_tars(tmp_path / "tars", "classes")
    for path in (tmp_path / "tars").iterdir():
        storage.put_file(f"{tars}/{path.name}", path)
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    options = [
        "--categories",
        str(tmp_path / "classes.json"),
        "--labels",
        "classes",
        "--report",
        str(tmp_path / "report.json"),
    ]
    assert main(["index", tars, "--output", tars, *options]) == 0
    out, err = capsys.readouterr()
    assert "12 samples of 3 tars" in out
    assert "image .jpg or .jpeg, classes in .png" in out
    assert "indexing: " in err
    assert json.loads((tmp_path / "report.json").read_text())["num_samples"] == 12
    assert Manifest.load(tars, storage).shards[0].name == "000.tar"
    assert main(["index", tars, "--output", str(tmp_path / "here"), *options]) == 0
    local = Manifest.load(str(tmp_path / "here"), storage)
    assert local.shards[0].name == f"{tars}/000.tar"
    assert local.read_sample(3, storage).key == "0003"
    assert main(["verify", tars, str(tmp_path / "here"), "--full"]) == 0
    bad = write_tar(tmp_path / "bad" / "a.tar", corrupt({f"{i}": members_of(i, "classes") for i in range(4)}, png=None))
    assert main(["index", str(bad), "--output", str(tmp_path / "out"), *options]) == 1
    assert "No manifest was written; correct the samples, or leave them out with --skip-bad" in capsys.readouterr().out
    assert main(["index", str(bad), "--output", str(tmp_path / "out"), *options, "--void", "x"]) == 2
