"""An adapter changes the cached vectors and nothing else, and the model is restored afterwards."""

import copy

import pytest
import torch

from eigencache.errors import LayerError, NonFiniteError, UnsupportedArchitectureError
from eigencache.geometry import geometry_from_config
from eigencache.models.capture import Capture
from eigencache.models.residual import Residual, Site, find_sites, inserted
from tiny_models import tiny, token_ids

SEPARATE = ("llama", "qwen2", "mistral", "gemma2", "opt", "gpt_oss")
FUSED = ("gpt2", "gpt_bigcode", "gpt_neox", "falcon_alibi", "phi3", "bloom")


def sites_of(name: str, target: str = "v", layers=None) -> list[Site]:
    model = tiny(name)
    return find_sites(model, geometry_from_config(model.config), target, layers, token_ids())  # type: ignore[arg-type]


def adapters(sites: list[Site], trained: bool) -> dict[int, Residual]:
    generator = torch.Generator().manual_seed(3)
    made = {site.layer_idx: Residual(site.width, 4, 0.5, generator) for site in sites}
    with torch.no_grad():
        for residual in made.values() if trained else ():
            residual.w_in.mul_(20)
            residual.w_out.add_(0.3 * torch.randn(residual.w_out.shape, generator=generator))
    return made


@torch.no_grad()
def cached(name: str) -> dict[int, dict[str, torch.Tensor]]:
    with Capture(tiny(name), geometry_from_config(tiny(name).config)) as capture:
        return {layer.layer_idx: dict(layer.tensors) for layer in capture.run(token_ids())}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("target", ["v", "k"])
@pytest.mark.parametrize("name", SEPARATE + FUSED)
def test_w_out_zero_changes_nothing_bit_for_bit(name: str, target: str) -> None:
    plain, sites = logits(tiny(name)), sites_of(name, target)
    assert [site.layer_idx for site in sites] == list(geometry_from_config(tiny(name).config).cached_layers)
    with inserted(sites, adapters(sites, trained=False)):
        assert torch.equal(logits(tiny(name)), plain)


@pytest.mark.parametrize("target", ["v", "k"])
@pytest.mark.parametrize("name", SEPARATE + FUSED)
def test_the_cache_is_given_m_times_what_it_was_given_before_and_the_other_slot_is_untouched(name: str, target: str) -> None:
    sites = sites_of(name, target)
    residuals, before, first = adapters(sites, trained=True), cached(name), sites[0].layer_idx
    with inserted(sites, residuals) as made:
        behind = cached(name)
    names = [n for n in before[first] if n.startswith("values" if target == "v" else "keys") and not n.endswith("post_rope")]
    assert len(names) == 1
    vectors = before[first][names[0]].transpose(1, 2).flatten(2).double()
    expected = (vectors @ residuals[first].operator.mT).float()
    found = behind[first][names[0]].transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((found - vectors).abs().max()) > 0.1
    for other in before[first]:
        if other.startswith("keys" if target == "v" else "values"):
            assert torch.equal(behind[first][other], before[first][other])
    last = sites[-1].layer_idx
    torch.testing.assert_close(made[last].detach(), behind[last][names[0]].transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_is_a_low_rank_change_of_its_projections_weights(name: str) -> None:
    sites = sites_of(name)
    residuals = adapters(sites, trained=True)
    with inserted(sites, residuals):
        found = logits(tiny(name))
    model = copy.deepcopy(tiny(name))
    names = {module: path for path, module in tiny(name).named_modules()}
    with torch.no_grad():
        for site in sites:
            module, columns, m = (
                model.get_submodule(names[site.module]),
                site.columns,
                residuals[site.layer_idx].operator.float(),
            )
            rows = module.weight.mT if name == "gpt2" else module.weight  # GPT-2 stores the transpose
            rows[columns] = m @ rows[columns]
            module.bias[columns] = m @ module.bias[columns]
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)


def test_every_hook_is_gone_afterwards_also_after_an_error() -> None:
    model = tiny("llama")
    before, plain = hooks(model), logits(model)
    sites = sites_of("llama")
    assert hooks(model) == before
    with pytest.raises(KeyboardInterrupt), inserted(sites, adapters(sites, trained=True)):
        assert hooks(model) == before + len(sites)
        raise KeyboardInterrupt
    with pytest.raises(KeyError), inserted(sites, {0: Residual(32, 4, 1.0, torch.Generator())}):  # the second site fails
        pass
    assert hooks(model) == before
    assert torch.equal(logits(model), plain)


def test_only_the_layers_asked_for_are_changed() -> None:
    sites = sites_of("llama", layers=(2,))
    before = cached("llama")
    with inserted(sites, adapters(sites, trained=True)):
        behind = cached("llama")
    assert torch.equal(before[1]["values"], behind[1]["values"])
    assert not torch.allclose(before[2]["values"], behind[2]["values"])


def test_a_narrow_dtype_is_kept() -> None:
    residual = Residual(8, 2, 1.0, torch.Generator().manual_seed(0))
    assert residual(torch.ones(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("target", ["v", "k"])
def test_mla_is_refused(target: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="layer 0 caches an MLA latent"):
        sites_of("deepseek_v2", target)


def test_keys_that_are_normed_after_their_projection_are_refused_and_values_are_not() -> None:
    assert len(sites_of("qwen3")) == 3
    with pytest.raises(
        UnsupportedArchitectureError, match="qwen3: the keys that layer 0 caches are not the output of a known projection"
    ):
        sites_of("qwen3", "k")
    assert not hooks(tiny("qwen3"))


def test_layers_without_a_cache_and_nan_are_named() -> None:
    with pytest.raises(LayerError, match="no layer 7"):
        sites_of("llama", layers=(7,))
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="values: layer 1"):
        find_sites(model, geometry_from_config(model.config), "v", None, token_ids())
