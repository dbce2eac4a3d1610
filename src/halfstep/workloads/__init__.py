"""Built-in training scripts: plain PyTorch programs that know nothing of halfstep and run alone.

They are what ``halfstep demo`` and the tests train: a GPT on English text that every Python ships, a small
convolutional classifier with BatchNorm, and a GAN with two optimizers.
"""
