"""Train a small convolutional classifier with BatchNorm on scikit-learn's bundled 8 x 8 digits.

Nothing is downloaded: the 1,797 images come with scikit-learn. Three of four train, the rest test. SGD with
Nesterov momentum, a learning rate that falls between epochs, a shuffling DataLoader. BatchNorm's running
averages are what this script adds to a plain loop: state that every forward pass writes.

    python digits_cnn.py --epochs 4
"""

import argparse

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images (N, 1, 8, 8), scaled to [-1, 1], with labels (N,).

    The split does not depend on the seed, so that accuracies of several seeds compare.
    """
    try:
        from sklearn.datasets import load_digits as bundled_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise SystemExit("this script needs scikit-learn: pip install scikit-learn") from None
    digits = bundled_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target, dtype=torch.long)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """3 x 3 convolution, BatchNorm, ReLU: (B, inputs, H, W) -> (B, outputs, H, W)."""
    # BatchNorm subtracts the mean, so a bias before it would do nothing.
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def build_model(channels: int) -> nn.Sequential:
    """Images (B, 1, 8, 8) -> logits (B, 10)."""
    return nn.Sequential(
        convolution(1, channels),
        convolution(channels, channels),
        nn.MaxPool2d(2),
        convolution(channels, 2 * channels),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * channels, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], device: str) -> float:
    """Share of the loader's images whose largest logit is the label's."""
    model.eval()
    right = total = 0
    for images, labels in loader:
        guesses = model(images.to(device)).argmax(dim=1)
        right += int((guesses == labels.to(device)).sum())
        total += len(labels)
    model.train()
    return right / total


def main() -> None:
    """Train, printing the mean loss of each epoch and the test accuracy at the end."""
    parser = argparse.ArgumentParser(
        description="Train a small CNN with BatchNorm on scikit-learn's bundled digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training images")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--channels", type=int, default=32, help="channels of the first convolution")
    parser.add_argument("--lr", type=float, default=0.1, help="initial learning rate")
    parser.add_argument("--decay-epochs", type=int, default=3, help="epochs between cuts of the learning rate by 5")
    parser.add_argument("--seed", type=int, default=1, help="of weights and shuffling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")

    torch.manual_seed(args.seed)
    train, test = load_digits()
    # A last batch of a few images would give BatchNorm statistics that are mostly noise.
    loader = DataLoader(train, batch_size=args.batch, shuffle=True, drop_last=True)
    model = build_model(args.channels).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()
    scheduler = StepLR(optimizer, step_size=args.decay_epochs, gamma=0.2)

    for epoch in range(1, args.epochs + 1):
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(images.to(args.device)), labels.to(args.device))
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch:3d}  loss {total / len(loader):.4f}  lr {scheduler.get_last_lr()[0]:g}", flush=True)
        scheduler.step()
    print(f"test accuracy {accuracy(model, DataLoader(test, batch_size=256), args.device):.4f}")


if __name__ == "__main__":
    main()
