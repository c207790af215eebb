"""INbreast and CBIS-DDSM, as files of their layout written here: no original is at hand."""

import csv
import plistlib
from pathlib import Path

import numpy as np
import pytest

from wsiengine.datasets.dicom import read_cbis, read_dicom, read_inbreast, read_plist
from wsiengine.datasets.images import openable, read_pixels
from wsiengine.datasets.reading import read_detections, recognise
from wsiengine.errors import WsiError

pydicom = pytest.importorskip("pydicom", reason="pydicom (extra `dicom`) is not installed")

SHAPE = (60, 44)


def write_dicom(file: Path, samples: np.ndarray, *, photometric: str = "MONOCHROME2", spacing: bool = True) -> None:
    """A grey image, uncompressed."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = samples.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, photometric, 0
    data.BitsAllocated = data.BitsStored = samples.dtype.itemsize * 8
    data.HighBit = data.BitsStored - 1
    if spacing:
        data.ImagerPixelSpacing = [0.07, 0.085]
    data.PixelData = samples.tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(file, enforce_file_format=True)


def ramp() -> np.ndarray:
    return (np.arange(SHAPE[0])[:, None] * 50 + np.arange(SHAPE[1])).astype(np.uint16)


def write_inbreast(folder: Path) -> Path:
    write_dicom(folder / "AllDICOMs" / "20586908_6c613a14b80a8591_MG_R_CC_ANON.dcm", ramp())
    write_dicom(folder / "AllDICOMs" / "20586934_6c613a14b80a8591_MG_L_CC_ANON.dcm", ramp())
    rois = [
        {"Name": "Mass", "Point_px": ["(10.0, 20.0)", "(18.5, 20.0)", "(18.5, 31.0)"], "NumberOfPoints": 3},
        {"Name": "Calcification", "Point_px": ["(5.0, 6.0)"], "NumberOfPoints": 1},
    ]
    said = {"Images": [{"ImageIndex": 0, "NumberOfROIs": 2, "ROIs": rois}]}
    (folder / "AllXML").mkdir()
    (folder / "AllXML" / "20586908.xml").write_bytes(plistlib.dumps(said))
    return folder


def test_inbreast_masses_are_objects(tmp_path: Path) -> None:
    folder = write_inbreast(tmp_path)
    assert recognise(folder) == "inbreast"
    with_mass, without = read_inbreast(folder).images
    assert with_mass.objects.boxes_xyxy.tolist() == [[10, 20, 18.5, 31], [5, 6, 6, 7]]
    assert with_mass.objects.ignored.tolist() == [False, True]
    assert with_mass.case == without.case == "6c613a14b80a8591"
    assert len(without.objects) == 0


def test_a_dicom_image_keeps_its_values_and_scale(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", ramp())
    found = read_dicom(tmp_path / "a.dcm")
    np.testing.assert_array_equal(found.pixels, ramp())
    assert found.mpp_yx == pytest.approx((70, 85))
    write_dicom(tmp_path / "b.dcm", ramp(), photometric="MONOCHROME1", spacing=False)
    np.testing.assert_array_equal(read_dicom(tmp_path / "b.dcm").pixels, ramp().max() - ramp())
    assert read_dicom(tmp_path / "b.dcm").mpp_yx is None


def test_the_engine_gets_a_copy_that_it_can_open(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", ramp())
    with openable(tmp_path / "a.dcm") as copy:
        assert copy.suffix == ".png"
        np.testing.assert_array_equal(read_pixels(copy), read_pixels(tmp_path / "a.dcm"))
    assert not copy.exists()


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"<plist", "property list"),
        (plistlib.dumps({"Images": [{}]}), "ROIs"),
        (plistlib.dumps({"Images": [{"ROIs": [{"Name": "Mass", "Point_px": ["(1, x)"]}]}]}), "broken point"),
        (plistlib.dumps({"Images": [{"ROIs": [{"Name": "Mass", "Point_px": []}]}]}), "no points"),
    ],
)
def test_a_broken_inbreast_file_is_refused_in_words(said: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "1.xml").write_bytes(said)
    with pytest.raises(WsiError, match=says):
        read_plist(tmp_path / "1.xml")


def test_a_cut_dicom_file_is_refused_in_words(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", ramp())
    (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:700])
    with pytest.raises(WsiError, match="DICOM"):
        read_dicom(tmp_path / "a.dcm")
    (tmp_path / "b.dcm").write_bytes(b"no dicom at all")
    with pytest.raises(WsiError, match="no whole DICOM"):
        read_dicom(tmp_path / "b.dcm")


COLUMNS = ("patient_id", "abnormality type", "image file path", "cropped image file path", "ROI mask file path")


def write_cbis(folder: Path, *, given: bool = True) -> Path:
    name = "Mass-Training_P_00001_LEFT_CC"
    mask = np.zeros(SHAPE, np.uint8)
    mask[20:35, 10:18] = 255
    write_dicom(folder / name / "1.2" / "000000.dcm", ramp())
    write_dicom(folder / f"{name}_1" / "1.3" / "1-1.dcm", np.full((15, 8), 200, np.uint8))  # the crop, where masks lie
    write_dicom(folder / f"{name}_1" / "1.3" / "1-2.dcm", mask)
    row = (
        "P_00001",
        "mass",
        f"{name}/1.2/000000.dcm" if given else f"{name}/9.9/000001.dcm",
        f"{name}_1/1.3/1-2.dcm",
        f"{name}_1/1.3/000001.dcm\n",
    )
    with (folder / "mass_case_description_train_set.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, row])
    return folder


@pytest.mark.parametrize("given", [True, False])
def test_cbis_masks_become_boxes(given: bool, tmp_path: Path) -> None:
    folder = write_cbis(tmp_path, given=given)
    assert recognise(folder) == "cbis"
    (row,) = read_detections(folder).images
    assert row.objects.boxes_xyxy.tolist() == [[10, 20, 18, 35]]
    assert row.case == "P_00001"
    assert row.mpp_yx == pytest.approx((70, 85))


def test_cbis_without_a_mask_of_the_image_is_refused(tmp_path: Path) -> None:
    folder = write_cbis(tmp_path)
    next(folder.rglob("1-2.dcm")).unlink()
    with pytest.raises(WsiError, match="44 × 60 px: found 8 × 15"):
        read_cbis(folder)


def test_cbis_paths_cannot_leave_the_folder(tmp_path: Path) -> None:
    folder = write_cbis(tmp_path / "set")
    table = folder / "mass_case_description_train_set.csv"
    write_dicom(tmp_path / "secret.dcm", ramp())
    table.write_text(table.read_text().replace("Mass-Training_P_00001_LEFT_CC/1.2/000000.dcm", "../secret.dcm"))
    with pytest.raises(WsiError, match="not there"):
        read_cbis(folder)


def test_mammograms_of_one_series_are_pictures_of_their_own(tmp_path: Path) -> None:
    """Of a slide's series one file is named; of a series of mammograms each."""
    from wsiengine.slides.dicom import files_of_series, one_of_each_series

    series = pydicom.uid.generate_uid()
    for modality, kept in (("MG", 2), ("SM", 1)):
        files = [tmp_path / f"{modality}{k}.dcm" for k in range(2)]
        for file in files:
            write_dicom(file, ramp())
            data = pydicom.dcmread(file)
            data.Modality, data.SeriesInstanceUID = modality, series
            data.save_as(file)
        assert len(one_of_each_series(files)) == kept
        assert (len(files_of_series(files[0])) > 1) is (modality == "SM")
