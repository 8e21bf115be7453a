"""A small model with the structure of DINOv2's repository: its names of classes, attributes and methods.

Written for these tests, so that they need no download; the forwards compute what the published model's do. Projects
carry copies of that code under their own module paths, which is what this file stands for.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

XFORMERS_AVAILABLE = False


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, norm_layer=None, flatten_embedding=True):
        super().__init__()
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.embed_dim = embed_dim
        self.flatten_embedding = flatten_embedding
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows, cols = self.patch_size
        assert height % rows == 0, f"height {height} is no multiple of {rows}"
        assert width % cols == 0, f"width {width} is no multiple of {cols}"
        x = self.proj(x)
        height, width = x.shape[-2:]
        x = self.norm(x.flatten(2).transpose(1, 2))
        return x if self.flatten_embedding else x.reshape(-1, height, width, self.embed_dim)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias=True, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(b, n, d)))


class MemEffAttention(Attention):
    def forward(self, x: Tensor, attn_bias=None) -> Tensor:
        if not XFORMERS_AVAILABLE:
            if attn_bias is not None:
                raise AssertionError("nested tensors need xFormers")
            return super().forward(x)
        b, n, d = x.shape
        q, k, v = torch.unbind(self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads), 2)
        x = memory_efficient_attention(q, k, v, attn_bias=attn_bias)  # noqa: F821
        return self.proj_drop(self.proj(x.reshape(b, n, d)))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class SwiGLUFFN(nn.Module):
    def __init__(self, dim, hidden, act_layer=None, drop=0.0):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim, init_values, inplace=False):
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        return x * (x.new_empty(x.shape[0], 1, 1).bernoulli_(keep) / keep)


def drop_add_residual_stochastic_depth(x: Tensor, residual_func, sample_drop_ratio: float) -> Tensor:
    """The branch of a random subset of the images, scaled up and added to those."""
    count = max(int(x.shape[0] * (1 - sample_drop_ratio)), 1)
    chosen = torch.randperm(x.shape[0], device=x.device)[:count]
    branch = residual_func(x[chosen])
    return torch.index_add(x.flatten(1), 0, chosen, branch.flatten(1), alpha=x.shape[0] / count).view_as(x)


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, init_values, drop_path, attn_class, ffn_layer, act_layer, drop=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn_class(dim, num_heads, attn_drop=drop, proj_drop=drop)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ffn_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x: Tensor) -> Tensor:
        def attn_residual_func(x: Tensor) -> Tensor:
            return self.ls1(self.attn(self.norm1(x)))

        def ffn_residual_func(x: Tensor) -> Tensor:
            return self.ls2(self.mlp(self.norm2(x)))

        if self.training and self.sample_drop_ratio > 0.1:
            x = drop_add_residual_stochastic_depth(x, attn_residual_func, self.sample_drop_ratio)
            return drop_add_residual_stochastic_depth(x, ffn_residual_func, self.sample_drop_ratio)
        if self.training and self.sample_drop_ratio > 0.0:
            x = x + self.drop_path1(attn_residual_func(x))
            return x + self.drop_path1(ffn_residual_func(x))
        x = x + attn_residual_func(x)
        return x + ffn_residual_func(x)


class NestedTensorBlock(Block):
    def forward_nested(self, x_list: list[Tensor]) -> list[Tensor]:
        return [super(NestedTensorBlock, self).forward(x) for x in x_list]

    def forward(self, x_or_x_list):
        if isinstance(x_or_x_list, Tensor):
            return super().forward(x_or_x_list)
        if isinstance(x_or_x_list, list):
            return self.forward_nested(x_or_x_list)
        raise AssertionError


class BlockChunk(nn.ModuleList):
    def forward(self, x):
        for block in self:
            x = block(x)
        return x


class DinoVisionTransformer(nn.Module):
    def __init__(
        self,
        img_size=24,
        patch_size=4,
        in_chans=3,
        embed_dim=48,
        depth=2,
        num_heads=4,
        mlp_ratio=2.0,
        init_values=0.3,
        drop_path_rate=0.0,
        drop=0.0,
        act_layer=nn.GELU,
        block_fn=NestedTensorBlock,
        attn_class=MemEffAttention,
        ffn_layer=Mlp,
        block_chunks=0,
        num_register_tokens=0,
        interpolate_antialias=False,
        interpolate_offset=0.1,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        registers = torch.zeros(1, num_register_tokens, embed_dim)
        self.register_tokens = nn.Parameter(registers) if num_register_tokens else None
        blocks = [
            block_fn(
                embed_dim,
                num_heads,
                mlp_ratio,
                init_values,
                drop_path_rate,
                attn_class,
                ffn_layer=ffn_layer,
                act_layer=act_layer,
                drop=drop,
            )
            for _ in range(depth)
        ]
        self.chunked_blocks = block_chunks > 0
        if self.chunked_blocks:
            size = depth // block_chunks
            # identities keep a block's number in the names of its parameters
            blocks = [BlockChunk([nn.Identity()] * i + blocks[i : i + size]) for i in range(0, depth, size)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        count = self.pos_embed.shape[1] - 1
        if x.shape[1] - 1 == count and w == h:
            return self.pos_embed
        first, patches = self.pos_embed.float().split([1, count], dim=1)
        side = int(math.sqrt(count))
        rows, cols = w // self.patch_size, h // self.patch_size
        if self.interpolate_offset:
            size = {"scale_factor": tuple((n + self.interpolate_offset) / side for n in (rows, cols))}
        else:
            size = {"size": (rows, cols)}
        grid = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, mode="bicubic", antialias=self.interpolate_antialias, **size)
        assert grid.shape[-2:] == (rows, cols)
        return torch.cat((first, grid.flatten(2).transpose(1, 2)), dim=1).to(x.dtype)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        w, h = x.shape[-2:]
        x = self.patch_embed(x)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.interpolate_pos_encoding(x, w, h)
        if self.register_tokens is not None:
            x = torch.cat((x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)
        return x

    def _parts(self, x: Tensor, masks: Tensor | None) -> dict:
        x_norm = self.norm(x)
        return {
            "x_norm_clstoken": x_norm[:, 0],
            "x_norm_regtokens": x_norm[:, 1 : self.num_register_tokens + 1],
            "x_norm_patchtokens": x_norm[:, self.num_register_tokens + 1 :],
            "x_prenorm": x,
            "masks": masks,
        }

    def forward_features_list(self, x_list: list[Tensor], masks_list: list) -> list[dict]:
        x = [self.prepare_tokens_with_masks(x, masks) for x, masks in zip(x_list, masks_list, strict=True)]
        for blk in self.blocks:
            x = blk(x)
        return [self._parts(tokens, masks) for tokens, masks in zip(x, masks_list, strict=True)]

    def forward_features(self, x, masks=None):
        if isinstance(x, list):
            return self.forward_features_list(x, masks)
        x = self.prepare_tokens_with_masks(x, masks)
        for blk in self.blocks:
            x = blk(x)
        x_norm = self.norm(x)
        return {
            "x_norm_clstoken": x_norm[:, 0],
            "x_norm_regtokens": x_norm[:, 1 : self.num_register_tokens + 1],
            "x_norm_patchtokens": x_norm[:, self.num_register_tokens + 1 :],
            "x_prenorm": x,
            "masks": masks,
        }

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        height, width = x.shape[-2:]
        x = self.prepare_tokens_with_masks(x)
        blocks = [b for chunk in self.blocks for b in chunk] if self.chunked_blocks else list(self.blocks)
        wanted = range(len(blocks) - n, len(blocks)) if isinstance(n, int) else n
        outputs = []
        for i, blk in enumerate(blocks):
            x = blk(x)
            if i in wanted:
                outputs.append(self.norm(x) if norm else x)
        classes = [out[:, 0] for out in outputs]
        outputs = [out[:, 1 + self.num_register_tokens :] for out in outputs]
        if reshape:
            grid = (height // self.patch_size, width // self.patch_size)
            outputs = [out.transpose(1, 2).unflatten(2, grid).contiguous() for out in outputs]
        return tuple(zip(outputs, classes, strict=True)) if return_class_token else tuple(outputs)

    def forward(self, *args, is_training=False, **kwargs):
        ret = self.forward_features(*args, **kwargs)
        return ret if is_training else self.head(ret["x_norm_clstoken"])
