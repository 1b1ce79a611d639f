/**
 * Import the polygons that wsiseg wrote into QuPath (0.4 or newer).
 *
 * With a project open, every image of the project for which there is a file; otherwise the open
 * image. For an image slide.svs the file is slide.geojson or slide.geojson.gz in the folder that
 * is asked for, or given as the first argument:
 *
 *     QuPath script --project=my/project.qpproj --args=my/masks import_wsiseg.groovy
 *
 * Of images with one name (caseA/1.tif, caseB/1.tif) the run.json in that folder tells the files apart, by
 * the paths of the slides. Where it does not, as the slides have been moved, none is imported.
 *
 * Objects of an earlier prediction are replaced; all other objects stay as they are. An image that
 * holds objects of the very file already is left alone, as they may have been corrected since; to
 * take them from the file again, give "replace" as the second argument, or set replaceAll below to true.
 */

import groovy.json.JsonSlurper
import java.nio.file.Paths
import java.util.zip.GZIPInputStream
import qupath.lib.common.GeneralTools
import qupath.lib.io.PathIO
import qupath.lib.scripting.QP

replaceAll = false

/** The folder with the results: the first argument, else asked for; null when cancelled. */
def chooseFolder(List arguments) {
    if (arguments)
        return new File(arguments[0].toString())
    def title = "Folder with the .geojson files of wsiseg"
    try {  // QuPath 0.5 and newer
        return Class.forName("qupath.fx.dialogs.FileChoosers").promptForDirectory(title, null)
    } catch (ClassNotFoundException ignored) {  // QuPath 0.4
        return Class.forName("qupath.lib.gui.dialogs.Dialogs").promptForDirectory(title, null)
    }
}

/** Names under which results of an image may lie: as it is, and without .svs or .ome.tif. */
def stems(Collection names) {
    def found = new LinkedHashSet()
    for (name in names.findAll { it != null }) {
        def bare = name.replaceFirst(/\.[^.\s]+$/, "")
        found << name << bare << bare.replaceFirst(/(?i)\.ome$/, "") << GeneralTools.stripExtension(name)
    }
    return found
}

/** The newer of the files there are by the name of an image, or null. */
def findFile(File folder, Collection names) {
    for (stem in stems(names)) {
        def files = [".geojson", ".geojson.gz"].collect { new File(folder, stem + it) }.findAll { it.isFile() }
        if (files)
            return files.max { it.lastModified() }
    }
    return null
}

/** Name of the results that a file is one of. */
def stemOf(File file) {
    return file.name.replaceFirst(/\.geojson(\.gz)?$/, "")
}

/** What a JSON file tells; nothing where there is none that can be read. */
Map readJson(File file) {
    try {
        def told = file.isFile() ? new JsonSlurper().parse(file, "UTF-8") : null
        return told instanceof Map ? told : [:]
    } catch (Exception ignored) {
        return [:]
    }
}

/** A part of the record beside a file; empty where there is none. */
Map partOfRecord(File file, String name) {
    def part = readJson(new File(file.parentFile, stemOf(file) + ".json"))[name]
    return part instanceof Map ? part : [:]
}

/** Path of the slide by name of its results; without names that several slides had. */
def slidePaths(File folder) {
    def told = readJson(new File(folder, "run.json")).slides
    def slides = told instanceof List ? told.findAll { it instanceof Map && it.status in ["ok", "no tissue"] } : []
    return slides.groupBy { it.stem }.findAll { it.value.size() == 1 }.collectEntries { [it.key, it.value[0].path] }
}

/** The newest file of each name in a folder, with name and path of its slide as far as they are told. */
def findResults(File folder) {
    def paths = slidePaths(folder)
    def files = folder.listFiles().findAll { it.isFile() && it.name ==~ /.+\.geojson(\.gz)?/ }
    return files.groupBy { stemOf(it) }.collect { stem, same ->
        def file = same.max { it.lastModified() }
        [file: file, slide: partOfRecord(file, "slide").path, path: paths[stem]]
    }
}

/** File names of an image, from its locations. */
def fileNames(uris) {
    return uris.findAll { it.path != null }.collect { new File(it.path).name }
}

/** Real paths of an image, of those of its locations that are files here. */
def realPaths(uris) {
    def found = []
    for (uri in uris) {
        try {
            found << Paths.get(uri).toRealPath().toString()
        } catch (Exception ignored) {
            // not here, or no file
        }
    }
    return found
}

/** What is known of an image by which its file is found. */
def describe(uris, name) {
    return [uris: uris as List, paths: realPaths(uris), files: fileNames(uris), name: name]
}

/** Whether the slide at a path is here and is neither an image's nor a copy of it. */
def isOther(String path, image) {
    def slide = path == null ? null : new File(path)
    return slide?.isFile() && image.paths && image.paths.every { new File(it).length() != slide.length() }
}

/** The files that may be of an image: that of its very slide, or else those of its name. */
def candidates(List results, File folder, image, Collection taken) {
    def own = results.find { it.path in image.paths }
    if (own != null)
        return [own.file]
    def bare = stems(image.files)  // where slides share a name, the results have a digest after it
    def named = results.findAll {
        it.slide in image.files && (stemOf(it.file) in bare || stemOf(it.file).replaceFirst(/-[0-9a-f]{8}$/, "") in bare)
    }
    if (!named) {
        def file = findFile(folder, image.files + [image.name])
        named = file == null ? [] : [results.find { it.file == file } ?: [file: file]]
    }
    return named.findAll { !(it.path in taken) && !isOther(it.path, image) }.collect { it.file }
}

/** Whether two images are of different slides. */
def differ(image, other) {
    return image.uris.disjoint(other.uris) && image.paths.disjoint(other.paths)
}

/** An image in words. */
def place(image) {
    return image.uris ? image.uris.collect { it.path ?: it }.join(" ") : image.name
}

/** The file of each image, null where there is none, in their order; says where it is not clear. */
def chooseFiles(List images, File folder) {
    def results = findResults(folder)
    def taken = images.collectMany { it.paths }
    def found = images.collect { candidates(results, folder, it, taken) }
    def unclear = new LinkedHashSet()
    def chosen = images.indices.collect { i ->
        if (!found[i])
            return null
        def rivals = images.indices.findAll { it == i || (found[i][0] in found[it] && differ(images[i], images[it])) }
        if (found[i].size() == 1 && rivals.size() == 1)
            return found[i][0]
        def of = rivals.collect { place(images[it]) }.join(", ")
        def files = found[i].collect { it.name }.sort().join(", ")
        unclear << "${files}: not clear of which image (${of}), none imported; drop the right file on each image".toString()
        return null
    }
    unclear.each { println it }
    return [files: chosen, unclear: images.indices.findAll { found[it] && chosen[it] == null }]
}

/** Whether an object came from wsiseg. */
def isOurs(object) {
    def data = object.respondsTo("getMetadata") ? object.getMetadata() :
        object.respondsTo("getMetadataMap") ? object.getMetadataMap() : [:]
    return data.keySet().any { it.toString().startsWith("wsiseg.") }
}

/** Whether the record beside a file tells of a slide of another size than the image. */
def isOfAnother(server, File file) {
    def size = partOfRecord(file, "mask").level0_size
    return size != null && (size[0] != server.getWidth() || size[1] != server.getHeight())
}

/** Replace what was imported into an image earlier by the objects of a file; whether it was done. */
def importFile(imageData, File file) {
    def hierarchy = imageData.getHierarchy()
    if (isOfAnother(imageData.getServer(), file)) {
        println "${file.name}: is of a slide of another size, not imported"
        return false
    }
    def objects = file.withInputStream { stream ->
        PathIO.readObjectsFromGeoJSON(file.name.endsWith(".gz") ? new GZIPInputStream(stream) : stream)
    }
    def ids = objects.collect { it.getId() } as Set
    if (!replaceAll && hierarchy.getAnnotationObjects().any { it.getId() in ids }) {
        println "${file.name}: the image holds objects of this prediction, left as it is (argument replace: take this file)"
        return false
    }
    def old = hierarchy.getAnnotationObjects().findAll { isOurs(it) || it.getId() in ids }
    hierarchy.removeObjects(old, true)
    hierarchy.addObjects(objects)
    hierarchy.fireHierarchyChangedEvent(this)
    println "${file.name}: ${objects.size()} objects (${old.size()} of an earlier import replaced)"
    return true
}

def arguments = []
try {
    arguments = args as List
} catch (MissingPropertyException ignored) {
    // run from the script editor
}
replaceAll = replaceAll || (arguments.size() > 1 && arguments[1].toString() == "replace")
def folder = chooseFolder(arguments)
if (folder == null)
    return
if (!folder.isDirectory()) {
    println "${folder} is not a folder"
    return
}

def openImage = QP.getCurrentImageData()
def project = QP.getProject()
if (project == null) {
    if (openImage == null) {
        println "Open a project or an image first"
        return
    }
    def image = describe(openImage.getServer().getURIs(), openImage.getServer().getMetadata().getName())
    def choice = chooseFiles([image], folder)
    if (choice.files[0] != null)
        importFile(openImage, choice.files[0])
    else if (!choice.unclear)
        println "No .geojson for ${image.name} in ${folder}"
    return
}

def openEntry = openImage == null ? null : project.getEntry(openImage)
def entries = project.getImageList() as List
def choice = chooseFiles(entries.collect { describe(it.getURIs(), it.getImageName()) }, folder)
def missing = []
def failed = 0
entries.eachWithIndex { entry, i ->
    def file = choice.files[i]
    if (file == null) {
        if (!(i in choice.unclear))
            missing << entry.getImageName()
        return
    }
    def isOpen = openEntry != null && entry.getID() == openEntry.getID()
    try {
        def imageData = isOpen ? openImage : entry.readImageData()
        try {
            if (importFile(imageData, file))
                entry.saveImageData(imageData)
        } finally {
            if (!isOpen)
                imageData.getServer().close()
        }
    } catch (Exception e) {  // the slide was moved, the file is damaged: the others go on
        failed++
        println "${file.name}: not imported into ${entry.getImageName()} (${e.toString().replaceAll(/\s+/, ' ')})"
    }
}
if (missing)
    println "No .geojson in ${folder} for: ${missing.join(', ')}"
if (failed)
    println "${failed} of ${entries.size()} images failed, see above"
