"""Flax Linen backbones, tiny siblings of them for tests, and loaders of real pretrained weights."""

from subspace_jax.core import WeightFileError as WeightFileError

from ._bert import Bert as Bert
from ._bert import BertConfig as BertConfig
from ._bert import small_bert as small_bert
from ._blocks import unpack_q4_1 as unpack_q4_1
from ._blocks import unpack_q8_0 as unpack_q8_0
from ._cache import KVCache as KVCache
from ._cache import init_cache as init_cache
from ._causal_examples import CausalEncoder as CausalEncoder
from ._causal_examples import CausalExample as CausalExample
from ._chat import TEMPLATES as TEMPLATES
from ._chat import ChatTemplate as ChatTemplate
from ._chat import TemplateError as TemplateError
from ._classifiers import BertClassifier as BertClassifier
from ._classifiers import LlamaClassifier as LlamaClassifier
from ._classifiers import VitClassifier as VitClassifier
from ._classifiers import mean_pool as mean_pool
from ._classifiers import pool_tokens as pool_tokens
from ._clip import Clip as Clip
from ._clip import normalize_clip_images as normalize_clip_images
from ._clip_config import ClipConfig as ClipConfig
from ._clip_config import ClipTower as ClipTower
from ._clip_config import small_clip as small_clip
from ._decode import greedy_decode as greedy_decode
from ._gemma3 import gemma3_file as gemma3_file
from ._gemma3 import load_gemma3 as load_gemma3
from ._gguf import GgufFile as GgufFile
from ._gguf import read_gguf as read_gguf
from ._gguf_export import GgufExportError as GgufExportError
from ._gguf_export import Precision as Precision
from ._gguf_export import export_gguf as export_gguf
from ._gguf_model import gguf_tokenizer as gguf_tokenizer
from ._gguf_model import load_gguf as load_gguf
from ._gguf_tensor import GgufTensor as GgufTensor
from ._gguf_write import write_gguf as write_gguf
from ._hf import load_hf as load_hf
from ._hidden_states import hidden_states as hidden_states
from ._hidden_states import patch_features as patch_features
from ._layers import stack_layers as stack_layers
from ._layers import unstack_layers as unstack_layers
from ._llama import Llama as Llama
from ._llama_config import LlamaConfig as LlamaConfig
from ._llama_config import small_llama as small_llama
from ._load import CARRIED as CARRIED
from ._load import has_blocks as has_blocks
from ._load import load as load
from ._minilm import load_minilm as load_minilm
from ._onnx import OnnxGraph as OnnxGraph
from ._onnx import OnnxNode as OnnxNode
from ._onnx import read_onnx as read_onnx
from ._position import cubic_resize_matrix as cubic_resize_matrix
from ._position import resize_positions as resize_positions
from ._pretrained import PretrainedModel as PretrainedModel
from ._pretrained import TextFormat as TextFormat
from ._pretrained import add_classifier as add_classifier
from ._rotary import RopeScaling as RopeScaling
from ._rotary import apply_rotary as apply_rotary
from ._rotary import rotary_tables as rotary_tables
from ._smollm2 import chat_prompt as chat_prompt
from ._smollm2 import load_smollm2 as load_smollm2
from ._tokenizer import encode_texts as encode_texts
from ._tokenizer import load_tokenizer as load_tokenizer
from ._vit import Vit as Vit
from ._vit import VitConfig as VitConfig
from ._vit import normalize_images as normalize_images
from ._vit import small_vit as small_vit
from ._vit_small import load_vit_small as load_vit_small

__all__ = [
    "CARRIED",
    "TEMPLATES",
    "Bert",
    "BertClassifier",
    "BertConfig",
    "CausalEncoder",
    "CausalExample",
    "ChatTemplate",
    "Clip",
    "ClipConfig",
    "ClipTower",
    "GgufExportError",
    "GgufFile",
    "GgufTensor",
    "KVCache",
    "Llama",
    "LlamaClassifier",
    "LlamaConfig",
    "OnnxGraph",
    "OnnxNode",
    "Precision",
    "PretrainedModel",
    "RopeScaling",
    "TemplateError",
    "TextFormat",
    "Vit",
    "VitClassifier",
    "VitConfig",
    "WeightFileError",
    "add_classifier",
    "apply_rotary",
    "chat_prompt",
    "cubic_resize_matrix",
    "encode_texts",
    "export_gguf",
    "gemma3_file",
    "gguf_tokenizer",
    "greedy_decode",
    "has_blocks",
    "hidden_states",
    "init_cache",
    "load",
    "load_gemma3",
    "load_gguf",
    "load_hf",
    "load_minilm",
    "load_smollm2",
    "load_tokenizer",
    "load_vit_small",
    "mean_pool",
    "normalize_clip_images",
    "normalize_images",
    "patch_features",
    "pool_tokens",
    "read_gguf",
    "read_onnx",
    "resize_positions",
    "rotary_tables",
    "small_bert",
    "small_clip",
    "small_llama",
    "small_vit",
    "stack_layers",
    "unpack_q4_1",
    "unpack_q8_0",
    "unstack_layers",
    "write_gguf",
]
