"""Pictures among the tokens: what a decoder with `config.vision` does with images. `Decoder` calls this; the data side fills the arrays.

Letters: B rows, M pictures a row, N pictures in all, H and W their sides in pixels, T tokens, S key slots, F tokens a picture, E size of
a feature, D hidden.

The interface, for whoever makes batches and for the stages:

    images_BMHWC   float32 pixel values [B, M, H, W, 3], as the family's preprocessing makes them (H = W = config.vision.image_size).
                   M is the same for every row of a batch; what a row does not have is zero. A tile is a picture of its own. Row by
                   row, so that micro-batches, shards and groups of one prompt take pictures along with their rows.
    tokens_BT      each picture is written out: `config.vision.tokens_per_image` times the id `config.vision.image_token`, with the
                   family's begin and end tokens around them (`ImagePrompt.expand`), in the order of the row's pictures.
    prompt_BT      True at the prompt's real tokens, False at the response and at padding. Placeholders are looked for in it only: a
                   policy that samples the placeholder's id gets the id's own embedding, in sampling and in learning alike.

    features_BMFE = decoder.encode_images(variables, images_BMHWC)
                   The tower, and the family's pooling or shuffling, none of which has trained parameters by default: encode once,
                   use for policy, reference, reward and value alike (unless `adapts_tower(lora)`, then each role has its own).
    hidden, cache = decoder.apply(variables, tokens_BT, mask_BS, ..., features=features_BMFE, prompt=prompt_BT)
                   The projector runs here, where it can be trained. Rows without a picture have no placeholder in their prompt.
                   Without any picture in a batch leave `features` out. `prompt` is needed with features, and by families whose
                   prompts are read in both directions (`config.vision.attention == "prefix"`) always, but for single tokens: a
                   decode step after the prefill takes neither.

Who sees whom follows from one integer per token (`blocks`): 0 sees what comes before it; tokens of one block see each other besides.
"""
