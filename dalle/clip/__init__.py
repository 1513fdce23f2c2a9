"""The reranker: a thin layer over open_clip (Radford et al. 2021; paper section 2.6)."""

from dalle.clip.model import CLIP, CLIPConfig, CLIPScorer, OpenClipScorer, PretrainedScorer

__all__ = ["CLIP", "CLIPConfig", "CLIPScorer", "OpenClipScorer", "PretrainedScorer"]
