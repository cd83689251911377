"""The papers' printed numbers of trained parameters; a new row is a line here.

Left out are numbers whose settings the papers do not give: AdapterD, AdapterL, AdapterH of GPT-2
and PreLayer (LoRA's tables 2 to 4), the shares of .5 to 6.7 % of He et al. 2021 other than these,
sizes chosen for each task (Houlsby et al. 2019, 3.6 %), and DeBERTa-XXL whole, of which only the
layers are modelled. A number that several rows repeat stands once.
"""

from __future__ import annotations

import functools

import peftjax as pj
from experiments.tables.counts import Cell
from peftjax.methods.base import Method

QV = ("query", "value")
ATTENTION = (*QV, "key", r".*/attention/output/dense/kernel")
FFN = (r".*/intermediate/dense/kernel", r".*/layers/output/dense/kernel")
BART = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
DORA = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def _lora(rank: int, *targets: str) -> Method:
  return pj.lora(rank, targets=targets or QV)


def _adapters(size: int, placement: str) -> Method:
  """Adapters with LayerNorms frozen, as in all releases but Houlsby's own."""
  return pj.adapters(size, placement, norms=False)


def _of_lora() -> list[Cell]:
  """Numbers of Hu et al. 2021, arXiv 2106.09685v2."""
  t2, t3, t4, t5 = (f"LoRA table {i}" for i in (2, 3, 4, 5))
  base, large, gpt3 = "RoBERTa-base", "RoBERTa-large", "GPT-3 175B"
  nominal = "a nominal size; the encoder has what we count, and a pooler that the task leaves out"
  out = r".*/attn/c_proj/kernel"
  rank_4 = "r = 4 of table 11; the PreLayer row prints the same number"
  made = [
    Cell(t2, base, "FT", "125.0M", pj.unfreeze(".*"), nominal, off="nominal"),
    Cell(t2, base, "BitFit", "0.1M", pj.unfreeze(".*/bias")),
    Cell(t2, base, "LoRA", "0.3M", _lora(8)),
    Cell(t2, large, "FT", "355.0M", pj.unfreeze(".*"), nominal, off="nominal"),
    Cell(t2, large, "LoRA", "0.8M", _lora(8)),
    Cell(
      t2, "DeBERTaV2-XXL", "LoRA", "4.7M", _lora(8), meant=("r = 16, as in the scripts", _lora(16))
    ),
    Cell(t3, "GPT-2 M", "FT", "354.92M", pj.unfreeze(".*"), "one digit is off: 354.82M"),
    Cell(t3, "GPT-2 M", "FT-Top2", "25.19M", pj.unfreeze(r".*/layers_2[23]/.*")),
    Cell(t3, "GPT-2 M", "LoRA", "0.35M", _lora(4), rank_4),
    Cell(t3, "GPT-2 L", "FT", "774.03M", pj.unfreeze(".*")),
    Cell(t3, "GPT-2 L", "LoRA", "0.77M", _lora(4), rank_4),
    Cell(
      t4,
      gpt3,
      "FT",
      "175,255.8M",
      pj.unfreeze(".*"),
      "more than its 96 layers and its tables; it is not said what",
      off="unexplained",
    ),
    Cell(
      t4,
      gpt3,
      "BitFit",
      "14.2M",
      pj.unfreeze(".*/bias"),
      "12 vectors of 12,288 a layer, which has 11",
      off="unexplained",
    ),
    Cell(
      t4, gpt3, "PreEmbed, 256 + 8 tokens", "3.2M", pj.prompt(264, init="normal"), "length inferred"
    ),
    Cell(t4, gpt3, "AdapterH, size 1", "7.1M", _adapters(1, "houlsby"), "size inferred"),
    Cell(t4, gpt3, "AdapterH, size 8", "40.1M", _adapters(8, "houlsby"), "size inferred"),
    Cell(t4, gpt3, "LoRA, r = 1", "4.7M", _lora(1)),
    Cell(t4, gpt3, "LoRA, r = 8", "37.7M", _lora(8)),
    *(
      Cell(t5, gpt3, f"{name}, r = {rank}", "18M", _lora(rank, *targets))
      for name, rank, targets in (
        ("Wq", 8, ("query",)),
        ("Wk", 8, ("key",)),
        ("Wv", 8, ("value",)),
        ("Wo", 8, (out,)),
        ("Wq Wk", 4, ("query", "key")),
        ("Wq Wv", 4, QV),
        ("Wq Wk Wv Wo", 2, (*QV, "key", out)),
      )
    ),
  ]
  for name, placement, size, printed in (
    ("AdptP", "pfeiffer", 64, "3.0M"),
    ("AdptP", "pfeiffer", 16, "0.8M"),
    ("AdptH", "houlsby", 64, "6.0M"),
    ("AdptH", "houlsby", 8, "0.8M"),
  ):
    note = "a whole million" if size == 64 else ""
    method = _adapters(size, placement)
    made.append(Cell(t2, large, f"{name}, size {size}", printed, method, note, off="nominal"))
  return made


def _of_adalora() -> list[Cell]:
  """Numbers of Zhang et al. 2023, arXiv 2303.10512; six matrices per layer, as in the scripts."""
  t1, t2, t3 = (f"AdaLoRA table {i}" for i in (1, 2, 3))
  base, bart, six = "DeBERTaV3-base", "BART-large", (*ATTENTION, *FFN)
  five = (*QV, "key", *FFN)
  made = [
    Cell(t1, base, "Full FT", "184M", pj.unfreeze(".*")),
    Cell(t1, base, "BitFit", "0.1M", pj.unfreeze(".*/bias")),
  ]
  for size, houlsby, pfeiffer in (
    (32, "1.22M", "1.18M"),
    (16, "0.61M", "0.60M"),
    (8, "0.31M", "0.30M"),
  ):
    note = "1.20M by the paper's own d = 32" if size == 32 else ""
    made += [
      Cell(t1, base, f"HAdapter, d = {size}", houlsby, _adapters(size, "houlsby"), note),
      Cell(t1, base, f"PAdapter, d = {2 * size}", pfeiffer, _adapters(2 * size, "pfeiffer")),
    ]
  for rank, lora, adalora in ((8, "1.33M", "1.27M"), (2, "0.33M", "0.32M")):
    evenly = pj.adalora(rank, target_rank=None, targets=six)
    note = (
      "triplets spread evenly; the printed number has fewer of them in the feed-forward, where "
      "figure 3 shows more"
    )
    made += [
      Cell(t1, base, f"LoRA, r = {rank}", lora, _lora(rank, *six)),
      Cell(t1, base, f"AdaLoRA, b = {72 * rank}", adalora, evenly, note, off="learned"),
    ]
  label = "a label for a budget, not a count"
  for rank, printed in ((1, "0.08%"), (2, "0.16%"), (4, "0.32%"), (8, "0.65%")):
    meant = ("five matrices, which the text lists", _lora(rank, *five))
    off = "nominal" if rank == 8 else "misprint"
    made += [
      Cell(
        t2,
        base,
        f"HAdapter, d = {4 * rank}",
        printed,
        _adapters(4 * rank, "houlsby"),
        label,
        off="nominal",
      ),
      Cell(
        t2,
        base,
        f"PAdapter, d = {8 * rank}",
        printed,
        _adapters(8 * rank, "pfeiffer"),
        label,
        off="nominal",
      ),
      Cell(t2, base, f"LoRA, r = {rank}", printed, _lora(rank, *six), label, meant=meant, off=off),
    ]
  for rank, printed in ((16, "2.20%"), (8, "1.10%"), (2, "0.26%"), (1, "0.13%")):
    note = "the rank is inferred; the scripts have 8 and 2"
    made.append(
      Cell(t3, bart, f"LoRA, r = {rank}", printed, _lora(rank, *BART), note, off="unexplained")
    )
  return made


def _of_dora() -> list[Cell]:
  """Numbers of Liu et al. 2024, arXiv 2402.09353; shares of all parameters, new ones included."""
  made = []
  for model, lora, half, dora in (
    ("LLaMA-7B", "0.83%", "0.43%", "0.84%"),
    ("LLaMA-13B", "0.67%", "0.35%", "0.68%"),
    ("LLaMA3-8B", "0.70%", "0.35%", "0.71%"),
  ):
    meant = (
      ("LoRA of r = 16, without magnitudes", _lora(16, *DORA)) if model == "LLaMA3-8B" else None
    )
    share = functools.partial(Cell, "DoRA table 1", model, of="all")
    made += [
      share("LoRA, r = 32", lora, _lora(32, *DORA)),
      share("DoRA†, r = 16", half, pj.dora(16, targets=DORA), meant=meant),
      share("DoRA, r = 32", dora, pj.dora(32, targets=DORA)),
    ]
  share = functools.partial(Cell, "DoRA table 5", "LLaMA-7B", of="all")
  made.append(share("LoRA, r = 64", "2.31%", _lora(64, "all-linear")))
  made.append(share("DoRA, r = 64", "2.33%", pj.dora(64, targets="all-linear")))
  return made


def _of_vera() -> list[Cell]:
  """Numbers of Kopiczko et al. 2024, arXiv 2310.11454; table 4's LoRA is QLoRA's setting."""
  made = []
  for model, printed in (
    ("RoBERTa-base", ("36.8K", "589.8K", "9437.1K")),
    ("RoBERTa-large", ("98.3K", "1572.8K", "25165.8K")),
    ("GPT-3 175B", ("4.7M", "75.5M", "1207.9M")),
  ):
    for rank, number in zip((1, 16, 256), printed, strict=True):
      method = _lora(rank, "query", "key")
      made.append(Cell("VeRA table 1", model, f"LoRA, r = {rank}", number, method))
  for model, number in (("LLaMA-7B", "159.9M"), ("LLaMA-13B", "250.3M")):
    made.append(Cell("VeRA table 4", model, "LoRA, r = 64", number, _lora(64, "all-linear")))
  return made


def _of_others() -> list[Cell]:
  """Numbers of IA3 (Liu et al. 2022), He et al. 2021, Houlsby et al. 2019 and BitFit (2021)."""
  norms = pj.unfreeze(r".*norm/scale")
  every = _lora(4, "q", "k", "v", "o", "wi_0", "wi_1", "wo")
  t4 = functools.partial(Cell, "IA3 table 4", "T0-3B")
  pfeiffer = _adapters(600, "pfeiffer")
  layers = "a share of the layers, without embeddings"
  return [
    t4("Full fine-tuning", "3B", pj.unfreeze(".*")),
    t4("IA3", "540K", pj.ia3(["k", "v"], ["wo"])),
    t4("LayerNorm", "250K", norms),
    t4(
      "LoRA, r = 4",
      "9.1M",
      every,
      meant=("with LayerNorms, as in the release", pj.chain(every, norms)),
    ),
    Cell("He table 2", "RoBERTa-base", "BitFit", "0.1%", pj.unfreeze(".*/bias")),
    Cell("He table 6", "BART-large", "Pfeiffer, r = 600", "7.2%", pfeiffer),
    Cell(
      "He table 6",
      "BART-large",
      "LoRA (ffn), r = 102",
      "7.2%",
      _lora(102, "fc1", "fc2"),
      meant=("the row of the Pfeiffer adapters", pfeiffer),
    ),
    Cell(
      "He table 6",
      "BART-large",
      "Parallel, r = 1024",
      "12.3%",
      _adapters(1024, "pfeiffer"),  # beside the feed-forward or after it: as many
      "12.39 % without biases, which would be cut to 12.3",
      off="unexplained",
    ),
    Cell("BitFit release", "BERT-large", "BitFit", "0.08%", pj.unfreeze(".*/bias")),
    Cell("Houlsby table 1", "BERT-large", "size 64", "2.1%", pj.adapters(64), layers, of="layers"),
  ]


ROWS = (*_of_lora(), *_of_adalora(), *_of_dora(), *_of_vera(), *_of_others())
