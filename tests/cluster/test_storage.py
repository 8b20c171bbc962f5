"""Pictures of a folder or a bucket: listed in one order, and never taken for another's failure."""

import hashlib
import pickle

import pyarrow.fs
import pytest
from PIL import Image

from msn_export import images
from msn_export.cluster.storage import PictureAddress, Store, list_sources, read_source
from msn_export.embedding.job import list_pictures
from msn_export.errors import ClusterError, ImageError, MissingPackageError
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize
from tests.builders.tiny_artifacts import pictures

HF = preset("hf", ImageSize(32, 32))
COUNT = 7


@pytest.fixture
def folder(tmp_path):
    at = pictures(tmp_path / "bucket/photographs", COUNT, (3,))
    (at / "a/readme.txt").write_text("no picture")
    (at / "a-first").mkdir()
    (at / "a-first/007.PNG").write_bytes((at / "a/000.png").read_bytes())
    return at


@pytest.fixture
def bucket(folder, monkeypatch):
    """Have s3:// and gs:// read that folder; a list of the URIs that were asked for."""
    asked = []

    class Local:
        @staticmethod
        def from_uri(uri):
            asked.append(uri)
            place = uri.partition("://")[2].partition("?")[0]
            place = place[place.index("bucket") :]
            local = pyarrow.fs.LocalFileSystem()
            return pyarrow.fs.SubTreeFileSystem(str(folder.parent.parent), local), place

    monkeypatch.setattr(pyarrow.fs, "FileSystem", Local)
    return asked


@pytest.mark.parametrize("uri", ["s3://bucket/photographs", "gs://bucket/photographs/"])
def test_a_bucket_is_listed_as_a_copy_of_it_would_be(bucket, folder, uri) -> None:
    found, store = list_sources(uri)
    local = list_pictures(folder)
    assert list(found.names()) == list(local.names())
    assert found.sha256 == local.sha256
    assert len(found) == len(local) == COUNT + 1
    assert str(found.folder) == uri
    assert found.root == uri.rstrip("/")
    assert bucket == [uri]
    assert store.scheme == uri[:2]


def test_a_bucket_and_its_copy_give_the_same_pixels_and_errors(bucket, folder) -> None:
    remote, store = list_sources("s3://bucket/photographs")
    store = pickle.loads(pickle.dumps(store))  # noqa: S301  as it goes to other machines
    local, here = list_sources(folder)
    broken = 0
    for far, near in zip(remote.paths, local.paths, strict=True):
        one = read_source(store.source(far.encode()), store=store, preprocessing=HF)
        other = read_source(here.source(bytes(near)), store=here, preprocessing=HF)
        if isinstance(one, str):
            broken += 1
            assert one.replace(f"s3://{far}", "") == other.replace(str(near), "")
            continue
        assert (one.pixels == other.pixels).all()
        assert one.sha256 == other.sha256 == hashlib.sha256(near.read_bytes()).digest()
        assert (other.pixels == images.read(near, HF)).all()
    assert broken == 1


def test_one_object_is_a_bucket_of_one(bucket) -> None:
    found, _ = list_sources("s3://bucket/photographs/a/000.png")
    assert list(found.names()) == ["000.png"]


def test_a_relative_folder_is_found_from_a_workers_own(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder.parent)
    found, store = list_sources(type(folder)("photographs"))
    source = store.source(bytes(found.paths[0]))
    assert source == PictureAddress(str(folder / "a/000.png"), "photographs/a/000.png")


@pytest.mark.parametrize("key", ["", "KEY:SECRET@", "KEY:SEC/RET@", "KEY@"])
def test_a_key_in_a_uri_is_never_shown(bucket, key) -> None:
    found, _ = list_sources(f"s3://{key}bucket/photographs?endpoint_override=host")
    assert found.folder == "s3://bucket/photographs"


def test_a_folder_with_an_at_sign_is_shown_as_it_is(bucket, folder) -> None:
    (folder / "a@b").mkdir()
    with pytest.raises(ImageError, match=r"^s3://bucket/photographs/a@b holds no picture"):
        list_sources("s3://bucket/photographs/a@b")


def test_a_key_is_not_shown_where_a_uri_cannot_be_read(monkeypatch) -> None:
    class Refusing:
        @staticmethod
        def from_uri(uri):
            raise ValueError(f"Cannot parse URI: '{uri}'")

    monkeypatch.setattr(pyarrow.fs, "FileSystem", Refusing)
    with pytest.raises(ClusterError) as refused:
        list_sources("s3://KEY:SEC/RET@bucket/a b")
    assert str(refused.value) == "cannot list s3://bucket/a b: Cannot parse URI: 's3://bucket/a b'"


def test_a_bucket_without_pictures_is_refused(bucket, folder) -> None:
    (folder / "c").mkdir()
    with pytest.raises(ImageError) as refused:
        list_sources("s3://bucket/photographs/c")
    assert str(refused.value) == "s3://bucket/photographs/c holds no picture that can be read"


def test_a_bucket_and_its_copy_hold_the_same_pictures_and_skip_the_same(bucket, folder) -> None:
    for name in (".hidden/a.png", "c/.a.png", "c/labels.csv", "c/plain", "c/d.heic"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic" if name.endswith("heic") else b"a,b")
    Image.new("RGB", (40, 30)).save(folder / "c" / "plain", "PNG")
    Image.new("RGB", (40, 30)).save(folder / "c" / "a.jfif", "JPEG")
    local, _ = list_sources(folder)
    remote, _ = list_sources("s3://bucket/photographs")
    assert list(remote.names()) == list(local.names())
    assert {"c/plain", "c/a.jfif"} <= set(local.names())
    assert remote.sha256 == local.sha256
    assert remote.skipped == local.skipped
    assert (local.skipped["hidden"], local.skipped["no picture"], len(local.skipped)) == (2, 2, 3)


def test_a_bucket_that_cannot_be_listed_is_one_line(bucket) -> None:
    with pytest.raises(ClusterError, match=r"^cannot list s3://bucket/nothing: .*nothing"):
        list_sources("s3://bucket/nothing")


def test_a_store_of_another_kind_is_refused() -> None:
    with pytest.raises(ImageError) as refused:
        list_sources("ftp://host/pictures")
    assert str(refused.value) == (
        "ftp://host/pictures: buckets of s3://, gs://, gcs:// are read; expected one of them, or "
        "a folder"
    )


def test_without_pyarrow_the_line_that_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'msn-export\[ray\]'$"):
        list_sources("s3://bucket/pictures")


class Failing:
    """A file system of which an object cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def open_input_file(self, path):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("bucket/a.png"),
        OSError("When reading: AWS Error ACCESS_DENIED during GetObject: no"),
        OSError("AWS Error NO_SUCH_KEY"),
    ],
)
def test_an_object_that_cannot_be_read_is_a_row_with_an_error(error) -> None:
    store = Store(Failing(error), scheme="s3")
    told = read_source(store.source(b"bucket/a.png"), store=store, preprocessing=HF)
    assert told == f"s3://bucket/a.png is not a readable picture ({error})"


def test_a_store_that_fails_is_no_pictures_fault() -> None:
    store = Store(Failing(OSError("AWS Error NETWORK_CONNECTION\nand more")), scheme="s3")
    with pytest.raises(ClusterError) as failed:
        read_source(store.source(b"bucket/a.png"), store=store, preprocessing=HF)
    assert str(failed.value) == "cannot read s3://bucket/a.png: AWS Error NETWORK_CONNECTION"


def test_an_object_too_large_to_decode_is_not_fetched() -> None:
    class Huge:
        def open_input_file(self, path):
            return self

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            pass

        def size(self):
            return 2**30 + 1

    store = Store(Huge(), scheme="gs")
    told = read_source(store.source(b"bucket/a.png"), store=store, preprocessing=HF)
    assert told == (
        "gs://bucket/a.png is not a readable picture (it has 1073741825 bytes; at most "
        "1073741824 are read)"
    )
