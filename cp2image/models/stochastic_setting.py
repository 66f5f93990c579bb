"""What the training of cp2image-s is made of. Ground floor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StochasticSetting:
    """What training is made of; 0 switches a part off.

    Attributes
    ----------
    autoencoder
        Share of the training, its first, in which the autoencoder learns; then its encoder is left
        as it is; beside the adversary its decoder learns every 8 steps.
    autoencoder_rate
        Its Adam's learning rate (β 0.9 and 0.99); it falls to 0 in a line over the last 40 % of
        that share. After that, half of it is the decoder's.
    divergence
        Weight of KL in its bound.
    alone
        Share of the training, after the autoencoder's, in which the generator learns by L_energy
        alone; 0: it begins with the adversary.
    learning_rate
        Of generator's and discriminator's Adam (β 0 and 0.99), at its highest.
    warmup
        Share of the rest of the training, its first, in which that rate rises from 0 in a line.
    energy
        Weight of `latent_energy_score` beside the adversary, until near the end it falls to 0.
    regression
        Weight of ½ Σ (feature − feature as predicted from the latents)² / p; near the end it rises
        to three times as much.
    measured
        Draws that are measured every 8 steps, over all ranks; from half a batch of the newest 2048
        the discriminator learns as well how features are to be read. Needs a `Measurement`.
    dropout
        Share of what the discriminator reads features from that is left out, each time another.
    penalty
        γ of R1 + R2: γ/2 · |∇ score|², for real and for generated latents.
    penalty_every
        Steps from one penalty to the next; it counts that many times.
    ema
        Decay of the averaged generator, per step, once training is under way.
    cooldown
        Share of the rest of the training, its last, in which that rate falls to 0 in a line.
    """

    autoencoder: float = 0.25
    autoencoder_rate: float = 2e-3
    divergence: float = 1.0
    alone: float = 0.05
    learning_rate: float = 6e-4
    warmup: float = 0.03
    energy: float = 0.03
    regression: float = 6.0
    measured: int = 16
    dropout: float = 0.3
    penalty: float = 1.0
    penalty_every: int = 8
    ema: float = 0.999
    cooldown: float = 0.6
