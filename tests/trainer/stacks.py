"""A stack of the softmax patterns that the tiny recipe lacks, as an override of it."""

import json

PATTERNS = "model.layers=" + json.dumps(
    {
        "blocks": {
            "window": {"mixer": "window", "window": 11, "attention_sink": True, "norm": "reordered"},
            "streaming": {"mixer": "streaming", "sinks": 3, "window": 7, "qk_norm": True, "softcap": 4.0},
            "sparse": {
                "mixer": "s2",
                "block": 4,
                "local_blocks": 2,
                "stride": 4,
                "dense_heads": 1,
                "offset": 1,
                "near": [5, 2],
                "attention_sink": True,
                "softcap": 6.0,
                "output_gate": True,
            },
            "heads": {
                "mixer": "pattern",
                "pattern": "PerHead([Window(5) | Sinks(2), Dilated(2, 3, 4)]) | Stripes(4, 6)",
                "attention_sink": True,
                "rotary_fraction": 0.5,
            },
        },
        "pattern": ["window", "streaming", "sparse", "heads"],
    }
)
