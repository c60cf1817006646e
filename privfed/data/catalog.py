"""Data sets that the toolkit knows: layout, licence, checksum and where to get them. Nothing is downloaded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KnownFile:
    """A file under the data folder, with the SHA-256 of the copy that the examples were made with."""

    name: str
    sha256: str


@dataclass(frozen=True)
class KnownSet:
    """A public data set.

    Attributes:
        name: what a user types.
        title: what it is.
        licence: the terms it comes under.
        obtain: where to get it.
        layout: what a row is, what the sites and labels are.
        traps: what goes wrong with it.
        files: its files.
        example: the configuration that uses it; empty where none does.
    """

    name: str
    title: str
    licence: str
    obtain: str
    layout: str
    traps: str
    files: tuple[KnownFile, ...]
    example: str = ""


KNOWN: tuple[KnownSet, ...] = (
    KnownSet(
        name="heart-disease",
        title="UCI Heart Disease, four hospitals",
        licence="CC BY 4.0; credit Janosi, Steinbrunn, Pfisterer, Detrano",
        obtain="UCI Machine Learning Repository, data set 45 (processed.*.data), into heart_disease/",
        layout="303 + 294 + 123 + 200 rows of 14 columns without a header, ? is missing; one file a hospital; "
        "label: column 14 above 0",
        traps="columns 11 to 13 are mostly missing outside Cleveland; cholesterol is 0 (missing) in Switzerland",
        files=(
            KnownFile(
                "heart_disease/processed.cleveland.data",
                "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
            ),
            KnownFile(
                "heart_disease/processed.hungarian.data",
                "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
            ),
            KnownFile(
                "heart_disease/processed.switzerland.data",
                "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
            ),
            KnownFile(
                "heart_disease/processed.va.data",
                "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
            ),
        ),
        example="examples/heart.toml",
    ),
    KnownSet(
        name="ist",
        title="International Stroke Trial, 466 hospitals",
        licence="ODC-By; cite doi 10.7488/ds/104",
        obtain="Edinburgh DataShare, doi 10.7488/ds/104 (version 2), as ist/IST.csv.gz",
        layout="19,435 patients, 112 columns; site: HOSPNUM (49 hospitals with 100 patients or more) or COUNTRY; "
        "label: OCCODE 1 or 2 = dead or dependent at six months (0 and 9 unknown)",
        traps="inputs are only AGE, SEX, STYPE and the baseline R* columns; D*, F* and derived ones leak the outcome",
        files=(KnownFile("ist/IST.csv.gz", "64e7e6e85e297488cde51c9a0cde43cc89c632ba18883efee4b79adb7cb9b993"),),
        example="examples/ist.toml",
    ),
    KnownSet(
        name="tcga-brca",
        title="TCGA breast cancer survival, six regions (Fed-TCGA-BRCA)",
        licence="GDC open-access terms: no re-identification",
        obtain="the FLamby repository, flamby/datasets/fed_tcga_brca, into tcga_brca/",
        layout="1,096 patients, 39 inputs, E (event) and T (time); site: k = 0 to 5 in train_test_split.csv",
        traps="151 events; the smallest test set has 11 cases",
        files=(
            KnownFile("tcga_brca/brca.csv", "07cb53423f7d579d33cfdbf2cba57b2aee75318b85866c68ce39a75b1f1ba020"),
            KnownFile(
                "tcga_brca/train_test_split.csv", "1249c6543a4060ff0fdaf8510fc37017755836db6c9fc5e6af96057c36510990"
            ),
        ),
    ),
    KnownSet(
        name="mnist-by-writer",
        title="MNIST digits with their writers",
        licence="MIT (images), BSD (writer ids, QMNIST)",
        obtain="MNIST in official order with the writer ids of QMNIST, as mnist_by_writer/mnist_by_writer.npz",
        layout="70,000 images of 28 × 28, label y, writer (539 in train, 297 others in test), hsf (0 or 4 in train)",
        traps="writers of train and test are disjoint",
        files=(
            KnownFile(
                "mnist_by_writer/mnist_by_writer.npz",
                "dc7a772e09bfcf2ba9dd20b232d19b1a45d9f49262d46874e8686ee12c1cd816",
            ),
        ),
    ),
    KnownSet(
        name="omniglot",
        title="Omniglot handwritten characters, small background sets",
        licence="MIT",
        obtain="the brendenlake/omniglot repository, python/, into omniglot/",
        layout="2,720 + 3,120 images of 10 alphabets, 20 drawers each; site: drawer or alphabet",
        traps="the full background and evaluation sets are separate files",
        files=(
            KnownFile(
                "omniglot/images_background_small1.zip",
                "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
            ),
            KnownFile(
                "omniglot/images_background_small2.zip",
                "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
            ),
        ),
    ),
    KnownSet(
        name="parkinsons",
        title="UCI Parkinsons Telemonitoring, 42 patients",
        licence="CC BY 4.0",
        obtain="UCI Machine Learning Repository, data set 189, as parkinsons_telemonitoring/parkinsons_updrs.data",
        layout="5,875 rows of 22 columns; site: subject#; label: motor_UPDRS or total_UPDRS",
        traps="rows of one patient are not independent",
        files=(
            KnownFile(
                "parkinsons_telemonitoring/parkinsons_updrs.data",
                "52229b3075c2109a2c144f5584d88cc5ea99022a9a9eaa6d978b2e8e7c6bc501",
            ),
        ),
        example="examples/parkinsons.toml",
    ),
)


def owner_of(file: str) -> KnownSet | None:
    """The known set that ``file``, a name or a whole path, belongs to."""
    path = Path(file).as_posix()
    return next((known for known in KNOWN if any(f"/{path}".endswith(f"/{f.name}") for f in known.files)), None)


def state_of(file: KnownFile, folder: Path) -> str:
    """ "missing", "ok", or "another version" by its checksum."""
    path = folder / file.name
    if not path.is_file():
        return "missing"
    with open(path, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return "ok" if digest == file.sha256 else "another version"
