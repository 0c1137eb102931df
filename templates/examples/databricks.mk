# The four runs of the Databricks article on LoRA, side by side: which layers matter more than rank, 4 bits as much as 8.
#
#   make -f databricks.mk                         reddot.csv (product, category, description) -> comparison.html
#   make -f databricks.mk MODEL=builtin:tiny      the same on a laptop, in minutes
#
# A run that was interrupted goes on, one that is complete is not trained again.
MODEL ?= openlm-research/open_llama_3b_v2
TABLE ?= reddot.csv
ROWS ?= 5000
TRAIN ?= --epochs 3
EVAL ?= --max-new 256
INSTRUCTION ?= Create a detailed description for the following product: {product}, belonging to category: {category}

r8-attention-4bit  = --qlora --r 8 --targets q_proj,v_proj
r16-attention-4bit = --qlora --r 16 --targets q_proj,v_proj
r8-all-4bit        = --qlora --r 8 --targets all-linear
r8-all-8bit        = --load-in-8bit --r 8 --targets all-linear
NAMES = r8-attention-4bit r16-attention-4bit r8-all-4bit r8-all-8bit

comparison.html: $(NAMES:%=runs/%/adapter/manifest.json)
	ftkit eval rows/test.jsonl --compare-runs $(NAMES:%=runs/%) $(EVAL) --report $@ -o comparison.jsonl --force

runs/%/adapter/manifest.json: rows/train.jsonl
	ftkit train $< --model $(MODEL) --run runs/$* $($*) $(TRAIN)

rows/train.jsonl: $(TABLE)
	ftkit prep $< --template alpaca-end --map "instruction=$(INSTRUCTION)" --map output=description \
	  --sample $(ROWS) --split train=0.9,test=0.1 -o rows --force
