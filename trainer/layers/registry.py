"""Every kind of layer that a recipe may name: a new one is a line here."""

from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from .base import Block
from .convolution import ConvolutionBlock
from .linear import (
    BasedBlock,
    DeltaNetBlock,
    GatedDeltaNetBlock,
    GLABlock,
    HedgehogBlock,
    KDABlock,
    LightningBlock,
    LinearBlock,
    Mamba2Block,
    RetentionBlock,
    SimpleGLABlock,
)
from .softmax import (
    FullBlock,
    MoBABlock,
    PatternBlock,
    S2Block,
    StreamingBlock,
    WindowBlock,
)

KINDS: tuple[type[Block], ...] = (
    FullBlock,
    S2Block,
    WindowBlock,
    StreamingBlock,
    PatternBlock,
    MoBABlock,
    LinearBlock,
    LightningBlock,
    RetentionBlock,
    SimpleGLABlock,
    GLABlock,
    BasedBlock,
    HedgehogBlock,
    Mamba2Block,
    DeltaNetBlock,
    GatedDeltaNetBlock,
    KDABlock,
    ConvolutionBlock,
)
"""In the order in which messages and docs/recipe-keys.md list them."""


class _OneOfKinds:
    """Tells pydantic that a block is of one of ``KINDS``, the one that its key ``mixer`` names."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return handler.generate_schema(Annotated[reduce(or_, KINDS), Field(discriminator="mixer")])


AnyBlock = Annotated[Block, _OneOfKinds()]
