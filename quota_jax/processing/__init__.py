"""Pictures and prompts to `Batch`, token ids back to text as Hugging Face does it."""

from quota_jax.processing.buckets import Buckets
from quota_jax.processing.pictures import Video
from quota_jax.processing.processor import Processor
from quota_jax.processing.templates import TEMPLATES
from quota_jax.processing.tokens import DecodeStream

__all__ = ["TEMPLATES", "Buckets", "DecodeStream", "Processor", "Video"]
