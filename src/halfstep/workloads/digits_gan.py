"""Train a small GAN on scikit-learn's bundled digits: two models, two optimizers, three backward passes.

The loop of DCGAN (Radford, Metz & Chintala, 2015): the discriminator learns from real images and, in a second
backward pass that adds to the same gradients, from generated ones; then the generator learns to pass for
real. Its backward pass also leaves gradients in the discriminator, which the next step clears.

    python digits_gan.py --steps 100
"""

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def load_digits() -> TensorDataset:
    """All images (N, 1, 8, 8), scaled to [-1, 1]: the range of the generator's tanh."""
    try:
        from sklearn.datasets import load_digits as bundled_digits
    except ModuleNotFoundError:
        raise SystemExit("this script needs scikit-learn: pip install scikit-learn") from None
    return TensorDataset(torch.tensor(bundled_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1)


def build_generator(latent: int, channels: int) -> nn.Sequential:
    """Noise (B, latent, 1, 1) -> images (B, 1, 8, 8)."""
    return nn.Sequential(
        nn.ConvTranspose2d(latent, 2 * channels, kernel_size=2, bias=False),  # 2 x 2
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * channels, channels, kernel_size=4, stride=2, padding=1, bias=False),  # 4 x 4
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.ConvTranspose2d(channels, 1, kernel_size=4, stride=2, padding=1),  # 8 x 8
        nn.Tanh(),
    )


def build_discriminator(channels: int) -> nn.Sequential:
    """Images (B, 1, 8, 8) -> logits (B, 1), positive where an image is taken for real."""
    return nn.Sequential(
        nn.Conv2d(1, channels, kernel_size=4, stride=2, padding=1),  # 4 x 4
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, 2 * channels, kernel_size=4, stride=2, padding=1, bias=False),  # 2 x 2
        nn.BatchNorm2d(2 * channels),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * channels, 1, kernel_size=2),
        nn.Flatten(),
    )


def initialize(module: nn.Module) -> None:
    """DCGAN's initial weights: normal with standard deviation 0.02, around 1 for BatchNorm."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)


def main() -> None:
    """Train, printing both losses and what the discriminator makes of real and generated images."""
    parser = argparse.ArgumentParser(
        description="Train a small DCGAN on scikit-learn's bundled digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=300, help="steps of each optimizer")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--latent", type=int, default=32, help="numbers of noise per image")
    parser.add_argument("--channels", type=int, default=32, help="channels next to the image")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate of both optimizers")
    parser.add_argument("--seed", type=int, default=1, help="of weights, shuffling and noise")
    parser.add_argument("--log-every", type=int, default=20, help="steps between printed lines")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")

    torch.manual_seed(args.seed)
    loader = DataLoader(load_digits(), batch_size=args.batch, shuffle=True, drop_last=True)
    generator = build_generator(args.latent, args.channels).apply(initialize).to(args.device)
    discriminator = build_discriminator(args.channels).apply(initialize).to(args.device)
    opt_g = torch.optim.Adam(generator.parameters(), lr=args.lr, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=args.lr, betas=(0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    ones = torch.ones(args.batch, 1, device=args.device)
    zeros = torch.zeros(args.batch, 1, device=args.device)

    def train_step(real: Tensor) -> str:
        """One step of the discriminator, then one of the generator; returns the losses as text."""
        opt_d.zero_grad()
        real_logits = discriminator(real)
        loss_real = criterion(real_logits, ones)
        loss_real.backward()
        fake = generator(torch.randn(args.batch, args.latent, 1, 1).to(args.device))
        fake_logits = discriminator(fake.detach())
        loss_fake = criterion(fake_logits, zeros)
        loss_fake.backward()
        opt_d.step()

        opt_g.zero_grad()
        loss_g = criterion(discriminator(fake), ones)
        loss_g.backward()
        opt_g.step()
        p_real, p_fake = real_logits.sigmoid().mean().item(), fake_logits.sigmoid().mean().item()
        loss_d = (loss_real + loss_fake).item()
        return f"loss_d {loss_d:.4f}  loss_g {loss_g.item():.4f}  p(real) {p_real:.3f}  p(fake) {p_fake:.3f}"

    step = 0
    while step < args.steps:
        for (images,) in loader:
            step += 1
            losses = train_step(images.to(args.device))
            if step == 1 or step % args.log_every == 0 or step == args.steps:
                print(f"step {step:5d}  {losses}", flush=True)
            if step == args.steps:
                break


if __name__ == "__main__":
    main()
