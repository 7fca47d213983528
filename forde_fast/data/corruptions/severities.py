"""The corruptions' names and how hard each of the severities 1 to 5 is."""

# The benchmark's averages are over the first 15; FoRDE's tables average all 19.
STANDARD = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
CORRUPTIONS = STANDARD + EXTRA

# One entry per severity; severities that the published recipe writes as tuples stay tuples.
CIFAR_SEVERITIES: dict[str, tuple] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "shot_noise": (500, 250, 100, 75, 50),  # photons per pixel at full brightness
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of values lost
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # disk radius, its smoothing
    "glass_blur": ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),  # blur before and after, rounds of shuffling
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, deviation
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),  # largest zoom, exclusive
    "snow": (  # flakes: mean, deviation, zoom, threshold, radius and deviation of their motion; share of the image
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),  # weight of the image, of the texture
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # amount, decay of the fractal's detail
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to the value of HSV
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # what is left of the distance to the mean
    "elastic_transform": (  # in units of the shorter side: displacement, its smoothing, shift of the three corners
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    ),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # width over the original's
    "jpeg_compression": (80, 65, 58, 50, 40),  # quality
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),  # standard deviation in pixels
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),  # factor and offset of HSV's saturation
    "spatter": (  # liquid: mean, deviation, smoothing, threshold; strength of water or smoothing of mud; mud or not
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),  # standard deviation, relative to the value
}

# CIFAR-10-C's noise, blur and pixelate hardly touch high-contrast grey images such as Fashion-MNIST's.
GREY_SEVERITIES: dict[str, tuple] = CIFAR_SEVERITIES | {
    "gaussian_noise": (0.1, 0.2, 0.3, 0.4, 0.5),
    "shot_noise": (60, 25, 12, 5, 3),
    "gaussian_blur": (0.75, 1.3125, 1.875, 2.4375, 3.0),
    "pixelate": (0.61, 0.52, 0.43, 0.34, 0.25),  # 28 pixels to 17, 14, 12, 9, 7; 16 would hurt more than 14
}

PRESETS = {"cifar": CIFAR_SEVERITIES, "grey": GREY_SEVERITIES}
# what the preset for grey images makes harder; elsewhere it is the other
HARDER = tuple(name for name in CORRUPTIONS if GREY_SEVERITIES[name] != CIFAR_SEVERITIES[name])
