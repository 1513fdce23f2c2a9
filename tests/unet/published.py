"""Configurations of published U-Nets, with their numbers of parameters and tensors."""

from dalle.unet import ClassifierConfig, DiffusionConfig, UNetConfig

COSINE, LINEAR = (DiffusionConfig(schedule, 1000, "noise", 0.0) for schedule in ("cosine", "linear"))

SIZE_64 = {"image_size": 64, "channel_mult": (1, 2, 3, 4)}
SIZE_256 = {"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "blocks": 2}
CLASSES = {"text": "none", "classes": 1000, "diffusion": LINEAR}
UPSAMPLER = SIZE_256 | {"low_resolution": True, "diffusion": LINEAR}

GLIDE = {
    "base": (UNetConfig(), 385_030_726, 783),
    "base_inpaint": (UNetConfig(inpainting=True), 385_037_638, 783),
    "upsample": (UNetConfig(**UPSAMPLER), 398_361_286, 797),
    "upsample_inpaint": (UNetConfig(**UPSAMPLER, inpainting=True), 398_368_198, 797),
}
ADM = {
    "ADM-64": (
        UNetConfig(**SIZE_64, **CLASSES | {"diffusion": COSINE}, attention_order="new"),
        295_904_454,
        541,
    ),
    "ADM-256": (UNetConfig(**SIZE_256, **CLASSES, width=256), 553_838_086, 567),
}
SIZE_128 = {"image_size": 128, "channel_mult": (1, 1, 2, 3, 4), "blocks": 2}
SIZE_512 = {"image_size": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "blocks": 2}
UPSAMPLER_512 = UPSAMPLER | {"image_size": 512, "attention": (32, 16)}
ALL_ADM = (
    *(config for config, *_ in ADM.values()),
    UNetConfig(**SIZE_128, **CLASSES, width=256, heads=4),
    UNetConfig(**SIZE_256, width=256, text="none", diffusion=LINEAR),  # also LSUN's
    UNetConfig(**SIZE_512, **CLASSES, width=256),
    UNetConfig(**UPSAMPLER | CLASSES, heads=4),
    UNetConfig(**UPSAMPLER_512 | CLASSES),
)
CLASSIFIER = ClassifierConfig()
CLASSIFIERS = (
    CLASSIFIER,
    ClassifierConfig(**SIZE_128),
    ClassifierConfig(**SIZE_256),
    ClassifierConfig(**SIZE_512),
)
CLASSIFIER_PARAMETERS = 65_438_568
OTHERS = {
    # 2238 million in the U-Net, 1316 in the text transformer (Nichol et al. 2021, section 4.1)
    "GLIDE's paper": (UNetConfig(width=512, text_width=2048, text_layers=24, text_heads=32), 3_554_414_086),
    "Karlo's decoder": (
        UNetConfig(width=320, text="clip", image_embedding=True, text_width=1536, text_len=77),
        893_318_086,
    ),
    "Karlo's upsampler": (
        UNetConfig(
            image_size=256,
            width=320,
            attention=(),
            middle_attention=False,
            scale_shift=False,
            text="none",
            low_resolution=True,
            learned_variance=False,
        ),
        691_579_523,
    ),
}
