// Explains one row with an explainer that was compiled ahead of time; no Python is involved.
//
//     attnlrp-fx compile sentiment -o model.lrp.pt2 --aot
//     ./explain model.lrp.pt2 i:101,2307,3185,102 i:1,1,1,1 i:0,0,0,0
//
// Each argument is one row of one of the model's inputs, in the order of the file's
// extra/explainer.json: "i:" integers, "f:" floating numbers. "--index 3" explains class or token 3
// rather than the highest. Prints a line for each result: the model's outputs, the explained value,
// its index, and the relevance of every explained input.

#include <cstdlib>
#include <exception>
#include <iomanip>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

at::Tensor row(const std::string& text) {
  const bool integers = text.rfind("i:", 0) == 0;
  if (!integers && text.rfind("f:", 0) != 0) {
    throw std::invalid_argument("'" + text + "' begins with neither i: nor f:");
  }
  std::istringstream numbers(text.substr(2));
  std::vector<double> values;
  for (std::string number; std::getline(numbers, number, ',');) {
    values.push_back(std::stod(number));
  }
  const auto dtype = integers ? at::kLong : at::kFloat;
  return at::tensor(values, at::kDouble).to(dtype).unsqueeze(0);
}

void show(const at::Tensor& tensor) {
  const auto flat = tensor.to(at::kCPU, at::kDouble).contiguous().flatten();
  for (int64_t i = 0; i < flat.numel(); ++i) {
    std::cout << (i ? " " : "") << std::setprecision(9) << flat[i].item<double>();
  }
  std::cout << "\n";
}

int main(int count, char** arguments) {
  if (count < 3) {
    std::cerr << "usage: explain FILE [--index N] i:1,2,3|f:0.5,1.5 ...\n";
    return 2;
  }
  try {
    int64_t index = -1;  // what the target chooses
    std::vector<at::Tensor> inputs;
    for (int i = 2; i < count; ++i) {
      if (std::string(arguments[i]) == "--index" && i + 1 < count) {
        index = std::atoll(arguments[++i]);
      } else {
        inputs.push_back(row(arguments[i]));
      }
    }
    inputs.push_back(at::full({1}, index, at::kLong));
    torch::inductor::AOTIModelPackageLoader loader(arguments[1]);
    for (const auto& result : loader.run(inputs)) {
      show(result);
    }
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
