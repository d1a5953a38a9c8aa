"""Data made for tests: images, folders of them, CIFAR files."""

import pickle

import numpy as np
from PIL import Image


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path, width=16, height=None, mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random_pixels(height or width, width, 3, seed=seed)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def write_folder(root, parts=("train", "test"), classes=("cat", "dog"), count=3, size=16, suffix="png"):
    for part in parts:
        for label, name in enumerate(classes):
            for number in range(count):
                write_image(root / part / name / f"{number}.{suffix}", size, seed=10 * label + number)
    return root


def write_pickle(path, content):
    # Protocol 2 and str keys: what Python 3 writes that comes nearest to the published files of Python 2.
    path.write_bytes(pickle.dumps(content, protocol=2))


CIFAR = {  # layout: (folder, train files, test file, meta file, classes)
    "cifar10-python": (
        "cifar-10-batches-py",
        [f"data_batch_{i}" for i in range(1, 6)],
        "test_batch",
        "batches.meta",
        10,
    ),
    "cifar100-python": ("cifar-100-python", ["train"], "test", "meta", 100),
    "cifar10-binary": (
        "cifar-10-batches-bin",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test_batch.bin",
        "batches.meta.txt",
        10,
    ),
    "cifar100-binary": ("cifar-100-binary", ["train.bin"], "test.bin", "fine_label_names.txt", 100),
}


def write_cifar(root, layout, count=4):
    """Returns the folder, and pixels (n, 3072) and labels of all training files and of the test file."""
    name, train, test, meta, classes = CIFAR[layout]
    folder = root / name
    folder.mkdir(parents=True)
    names = [f"class{label}" for label in range(classes)]
    written = []
    for number, file in enumerate([*train, test]):
        pixels = random_pixels(count, 3072, seed=number)
        labels = [(number + 7 * image) % classes for image in range(count)]
        written.append((pixels, labels))
        if layout.endswith("python"):
            fields = {"data": pixels, "fine_labels" if classes == 100 else "labels": labels}
            write_pickle(folder / file, fields | {"coarse_labels": [0] * count, "filenames": ["x.png"] * count})
        else:
            coarse = [np.full((count, 1), 19, np.uint8)] if classes == 100 else []
            records = np.concatenate([*coarse, np.array(labels, np.uint8)[:, None], pixels], axis=1)
            (folder / file).write_bytes(records.tobytes())
    if layout.endswith("python"):
        write_pickle(folder / meta, {"fine_label_names" if classes == 100 else "label_names": names})
    else:
        (folder / meta).write_text("\n".join(names) + "\n\n")
    train_pixels = np.concatenate([pixels for pixels, _ in written[:-1]])
    train_labels = [label for _, labels in written[:-1] for label in labels]
    return folder, (train_pixels, train_labels), written[-1]
