// Run a graph in onnxruntime-node (CPU) or onnxruntime-web (WASM, one thread) of the npm project
// in the working directory; the third argument names the package.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";

process.on("uncaughtException", (error) => {
  // onnxruntime-web throws the address of a C++ exception
  console.error(error instanceof Error ? String(error) : "Error: a C++ exception without a text");
  process.exit(1);
});
const [graph, folder, name] = process.argv.slice(2);
const require = createRequire(path.join(process.cwd(), "package.json"));
const ort = require(name);
const given = JSON.parse(fs.readFileSync(path.join(folder, "input.json"), "utf8"));
const bytes = fs.readFileSync(path.join(folder, "input.bin"));
const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
const images =
  given.dtype === "uint8"
    ? new ort.Tensor("uint8", new Uint8Array(buffer), given.shape)
    : new ort.Tensor("float32", new Float32Array(buffer), given.shape);
const web = name === "onnxruntime-web";
if (web) ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(web ? fs.readFileSync(graph) : graph, {
  executionProviders: [web ? "wasm" : "cpu"],
  logSeverityLevel: 3,
});
const found = await session.run({ [given.name]: images });
const outputs = {};
for (const [output, tensor] of Object.entries(found)) {
  outputs[output] = { shape: tensor.dims, values: Array.from(tensor.data, Number) };
}
fs.writeFileSync(path.join(folder, "outputs.json"), JSON.stringify(outputs));
process.exit(0);
