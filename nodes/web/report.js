// A new report opens at a size at which its picture can be read. A saved workflow brings a size of its own.
import { app } from "../../scripts/app.js"

const REPORT = "SpargeAttnReport", BENCHMARK = "SpargeAttnBenchmark"
const SIZE = [600, 1000]

// The editor makes the node as low as its widgets whenever a shape is chosen.
function growForPicture(node) {
  const { onExecuted } = node
  node.onExecuted = function (...results) {
    onExecuted?.apply(this, results)
    if (this.size[1] < SIZE[1]) this.setSize([this.size[0], SIZE[1]])
  }
}

app.registerExtension({
  name: "SpargeAttn.report",
  nodeCreated(node) {
    if (![REPORT, BENCHMARK].includes(node.comfyClass)) return
    node.setSize([...SIZE])
    if (node.comfyClass === BENCHMARK) growForPicture(node)
  }
})
