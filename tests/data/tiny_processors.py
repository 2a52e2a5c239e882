"""Small `preprocessor_config.json`s, one for each preprocessing that a supported model family has."""

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SCALE = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_resize": True}
CENTRE = {"do_center_crop": True, "crop_size": {"height": 14, "width": 14}}

CONFIGS = {
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 14, "width": 14}, "resample": 3, **SCALE, **HALF},
    "paligemma": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}, "resample": 3, **SCALE, **HALF},
    "gemma3": {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}, "resample": 2, **SCALE, **HALF},
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 14}, "resample": 3, **SCALE, **CENTRE, **CLIP},
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 18}, "resample": 3, **SCALE, **CENTRE, **IMAGENET},
    "crop larger than the picture": {
        "image_processor_type": "BitImageProcessor",
        **SCALE,
        **IMAGENET,
        "do_resize": False,
        "do_center_crop": True,
        "crop_size": {"height": 31, "width": 24},
    },
    "llava": {
        "image_processor_type": "LlavaImageProcessor",
        "size": {"shortest_edge": 14},
        "do_pad": True,
        "resample": 3,
        **SCALE,
        **CENTRE,
        **CLIP,
    },
    "idefics3": {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 32},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": False,
        "do_pad": True,
        "resample": 1,
        **SCALE,
        **HALF,
    },
    "smolvlm tiles": {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 40},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": True,
        "do_pad": True,
        "resample": 1,
        **SCALE,
        **HALF,
    },
    "smolvlm tiles, one of them": {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 16},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": True,
        "do_pad": True,
        "resample": 1,
        **SCALE,
        **HALF,
    },
}
