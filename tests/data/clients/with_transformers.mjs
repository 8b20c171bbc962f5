// Run a graph in transformers.js of the npm project in the working directory, as a local model:
// the folder holds config.json and onnx/model.onnx, and nothing is fetched.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

process.on("uncaughtException", (error) => {
  // onnxruntime-web throws the address of a C++ exception
  console.error(error instanceof Error ? String(error) : "Error: a C++ exception without a text");
  process.exit(1);
});
const [model, folder] = process.argv.slice(2);
const name = "@huggingface/transformers";
const require = createRequire(path.join(process.cwd(), "package.json"));
const library = await import(pathToFileURL(require.resolve(name)).href);
const { AutoModelForImageClassification, Tensor, env } = library.default ?? library;
env.allowRemoteModels = false;
env.localModelPath = path.dirname(model);
const given = JSON.parse(fs.readFileSync(path.join(folder, "input.json"), "utf8"));
const bytes = fs.readFileSync(path.join(folder, "input.bin"));
const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
const images = new Tensor(given.dtype, new Float32Array(buffer), given.shape);
const loaded = await AutoModelForImageClassification.from_pretrained(path.basename(model), {
  dtype: "fp32", // the file's name only: onnx/model.onnx
  device: "cpu",
});
const found = await loaded({ [given.name]: images });
const outputs = {};
for (const [output, tensor] of Object.entries(found)) {
  outputs[output] = { shape: tensor.dims, values: Array.from(tensor.data, Number) };
}
fs.writeFileSync(path.join(folder, "outputs.json"), JSON.stringify(outputs));
process.exit(0);
