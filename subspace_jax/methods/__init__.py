"""Published methods, one home each: `sj.methods.<slug>` has all public names of one."""

from subspace_jax.methods.analysis import gist as gist
from subspace_jax.methods.analysis import intruder_dimensions as intruder_dimensions
from subspace_jax.methods.analysis import subspace_ad as subspace_ad
from subspace_jax.methods.continual import coso as coso
from subspace_jax.methods.continual import gpm as gpm
from subspace_jax.methods.continual import igsp as igsp
from subspace_jax.methods.continual import o_lora as o_lora
from subspace_jax.methods.continual import osf as osf
from subspace_jax.methods.low_rank import block_lora as block_lora
from subspace_jax.methods.low_rank import comp_lora as comp_lora
from subspace_jax.methods.low_rank import corda as corda
from subspace_jax.methods.low_rank import dora as dora
from subspace_jax.methods.low_rank import loldu as loldu
from subspace_jax.methods.low_rank import lora as lora
from subspace_jax.methods.low_rank import lora_sb as lora_sb
from subspace_jax.methods.low_rank import lora_squeeze as lora_squeeze
from subspace_jax.methods.low_rank import matryoshka as matryoshka
from subspace_jax.methods.low_rank import orthogonal_adaptation as orthogonal_adaptation
from subspace_jax.methods.low_rank import pego as pego
from subspace_jax.methods.low_rank import pissa as pissa
from subspace_jax.methods.low_rank import qlora as qlora
from subspace_jax.methods.low_rank import queryable_lora as queryable_lora
from subspace_jax.methods.low_rank import svfit as svfit
from subspace_jax.methods.merging import capvector as capvector
from subspace_jax.methods.merging import concrete as concrete
from subspace_jax.methods.merging import do_merging as do_merging
from subspace_jax.methods.merging import orthomerge as orthomerge
from subspace_jax.methods.optimizers import aro as aro
from subspace_jax.methods.optimizers import dct_lowrank as dct_lowrank
from subspace_jax.methods.optimizers import frank_wolfe_dictionary as frank_wolfe_dictionary
from subspace_jax.methods.optimizers import galore as galore
from subspace_jax.methods.optimizers import lora_pro as lora_pro
from subspace_jax.methods.optimizers import root as root
from subspace_jax.methods.regularized import dr_tune as dr_tune
from subspace_jax.methods.regularized import lambda_orthogonality as lambda_orthogonality
from subspace_jax.methods.regularized import orthogonal_conv as orthogonal_conv
from subspace_jax.methods.regularized import orthoreg as orthoreg
from subspace_jax.methods.sparse import composable_sft as composable_sft
from subspace_jax.methods.sparse import lift as lift
from subspace_jax.methods.sparse import mosa as mosa
from subspace_jax.methods.sparse import s2ft as s2ft
from subspace_jax.methods.sparse import sara as sara
from subspace_jax.methods.sparse import snell as snell
from subspace_jax.methods.sparse import snella as snella
from subspace_jax.methods.sparse import spt as spt
from subspace_jax.methods.structured import flora as flora
from subspace_jax.methods.structured import loca as loca
from subspace_jax.methods.structured import oft as oft
from subspace_jax.methods.structured import randlora as randlora
from subspace_jax.methods.structured import soka as soka
from subspace_jax.methods.structured import ssf as ssf
from subspace_jax.methods.systems import deep_subspace_clustering as deep_subspace_clustering
from subspace_jax.methods.systems import gcr as gcr
from subspace_jax.methods.systems import hypernetwork as hypernetwork
from subspace_jax.methods.systems import lemon as lemon

__all__ = [
    "aro",
    "block_lora",
    "capvector",
    "comp_lora",
    "composable_sft",
    "concrete",
    "corda",
    "coso",
    "dct_lowrank",
    "deep_subspace_clustering",
    "do_merging",
    "dora",
    "dr_tune",
    "flora",
    "frank_wolfe_dictionary",
    "galore",
    "gcr",
    "gist",
    "gpm",
    "hypernetwork",
    "igsp",
    "intruder_dimensions",
    "lambda_orthogonality",
    "lemon",
    "lift",
    "loca",
    "loldu",
    "lora",
    "lora_pro",
    "lora_sb",
    "lora_squeeze",
    "matryoshka",
    "mosa",
    "o_lora",
    "oft",
    "orthogonal_adaptation",
    "orthogonal_conv",
    "orthomerge",
    "orthoreg",
    "osf",
    "pego",
    "pissa",
    "qlora",
    "queryable_lora",
    "randlora",
    "root",
    "s2ft",
    "sara",
    "snell",
    "snella",
    "soka",
    "spt",
    "ssf",
    "subspace_ad",
    "svfit",
]
